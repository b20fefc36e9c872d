//! Blocks: straight lines of micro-ops with one entry.

use iced_x86::{Code, Decoder, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::cache::BlockId;
use super::liveness::dead_flags;
use super::{feature, lower, MAX_LENGTH};
use crate::cpu::{CodeSize, Cpu};
use crate::exec;
use crate::jit::link::Links;
use crate::memory::{PAGE_OFFSET, PAGE_SIZE};
use crate::model::Model;
use crate::pmu::branch::Kind;
use crate::pmu::Watching;
use crate::uop::{Exec, Handler, Uop};

/// Most instructions of a block.
pub const MAX_INSTRUCTIONS: usize = 64;

/// What a block's translation depends on besides its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Host address of the first byte.
    pub host: u64,
    pub size: CodeSize,
    /// How host code of the block watches its branch (see [`crate::pmu::Watching`]).
    pub watching: Watching,
}

impl std::hash::Hash for CodeSize {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        state.write_u8(*self as u8);
    }
}

/// A block that ran behind another one, and where: what a jump-cache entry says, kept beside the block that leads there.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Link {
    pub rip: u64,
    pub context: u64,
    pub block: *mut Block,
}

impl Link {
    pub const NONE: Link = Link { rip: 0, context: u64::MAX, block: std::ptr::null_mut() };
}

/// A decoded block. Its last micro-op is always one that leaves it. What every run touches comes first.
#[repr(C)]
pub struct Block {
    /// One micro-op per instruction, and one more that falls through to what follows.
    pub uops: Box<[Uop]>,
    pub instructions: u32,
    pub valid: bool,
    /// The first instruction has a hidden breakpoint.
    pub breakpoint: bool,
    /// The branch that its last instruction is.
    pub branch: Kind,
    /// Distance of its last instruction from the first byte.
    pub last: u16,
    /// The first two blocks that ran behind this one.
    pub followers: [Link; 2],
    /// Where host code of other blocks enters this one: its own host code, or what leads to the dispatcher.
    pub entry: *const u8,
    /// Where the dispatcher enters its host code; null without a translation.
    pub body: *const u8,
    /// Ways between its host code and that of others.
    pub links: Option<Box<Links>>,
    /// It is one of those that run most: accesses of its host code have cells.
    pub busy: bool,
    /// Those that have none all the same, because they meet another page each time; the ones from number 63 on are one.
    pub wandering: u64,
    /// Runs by the interpreter.
    pub heat: u32,
    /// Length in bytes.
    pub length: u32,
    /// Number of the block in the cache.
    pub number: BlockId,
    pub key: Key,
    /// The reference handler of each instruction.
    pub reference: Box<[Handler]>,
    /// Host page of the tail of an instruction that crosses into it.
    pub second_page: Option<u64>,
}

impl Block {
    fn new(key: Key) -> Self {
        Block {
            uops: Box::default(),
            instructions: 0,
            valid: true,
            breakpoint: false,
            branch: Kind::None,
            last: 0,
            followers: [Link::NONE; 2],
            entry: std::ptr::null(),
            body: std::ptr::null(),
            links: None,
            busy: false,
            wandering: 0,
            heat: 0,
            length: 0,
            number: 0,
            key,
            reference: Box::default(),
            second_page: None,
        }
    }

    /// Makes the block one of `instructions`, with fast handlers where there are some.
    fn fill(&mut self, instructions: &[Instruction], model: &Model) {
        let dead = dead_flags(instructions, model.silicon());
        let mut uops: Vec<Uop> = instructions.iter().map(|insn| lower(insn, self.key.size, model)).collect();
        self.reference = uops.iter().map(|uop| uop.run).collect();
        for (n, (uop, insn)) in uops.iter_mut().zip(instructions).enumerate() {
            uop.run = exec::fast::handler(insn, uop, instructions.get(n + 1), dead[n]).unwrap_or(uop.run);
        }
        if self.breakpoint {
            uops[0].run = exec::breakpoint;
        }
        self.instructions = instructions.len() as u32;
        if let Some(last) = instructions.last() {
            (self.branch, self.last) = (Kind::of(last), last.ip() as u16);
        }
        self.length = instructions.iter().map(|insn| insn.len() as u32).sum();
        uops.push(fall_through(self.length));
        self.uops = uops.into();
        // Fast handlers find the next micro-op by its address.
        self.uops.as_ptr().expose_provenance();
    }
}

impl Block {
    /// The block that ran behind this one at `rip` in `context`, if it is one of the first two.
    #[inline(always)]
    pub fn successor(&self, rip: u64, context: u64) -> Option<*mut Block> {
        self.followers.iter().find(|link| link.rip == rip && link.context == context).map(|link| link.block)
    }

    /// Remembers a successor, if there is room: a link of another context or to a dead block is room.
    pub fn link(&mut self, rip: u64, context: u64, block: *mut Block) {
        // SAFETY: links are forgotten before the blocks that they name are freed.
        let free = self.followers.iter_mut().find(|link| link.context != context || !unsafe { (*link.block).valid });
        if let Some(link) = free {
            *link = Link { rip, context, block };
        }
    }
}

/// Decodes the block at the current RIP. A fetch fault of the first instruction is raised; one of a later instruction ends the block.
pub fn decode(cpu: &mut Cpu) -> Exec<Block> {
    let rip = cpu.rip();
    let la = code_address(cpu, rip)?;
    let host = cpu.fetch_address(la)?;
    cpu.claim_code(host as u64);
    let size = cpu.code_size;
    let left = (PAGE_SIZE - (la & PAGE_OFFSET)) as usize;
    // Guest RAM may change while we read it, so decode from a copy.
    let mut bytes = [0u8; MAX_INSTRUCTIONS * MAX_LENGTH];
    let available = left.min(bytes.len());
    // SAFETY: `host` is a translated page and `available` does not reach beyond it.
    unsafe { host.copy_to_nonoverlapping(bytes.as_mut_ptr(), available) };
    let mut block = Block::new(cpu.code_key(host as u64));
    block.breakpoint = cpu.npt.breakpoints.at_host(host as u64);
    let mut instructions = decode_page(&bytes[..available], size, &cpu.model);
    if cpu.npt.breakpoints.any() {
        end_before_breakpoint(&mut instructions, |offset| cpu.npt.breakpoints.at_host(host as u64 + offset));
    }
    if instructions.is_empty() {
        return crossing(cpu, la, &bytes[..available], block);
    }
    block.fill(&instructions, &cpu.model);
    Ok(block)
}

/// Leaves instructions with a hidden breakpoint to the beginning of a block.
fn end_before_breakpoint(instructions: &mut Vec<Instruction>, hit: impl Fn(u64) -> bool) {
    // The decoder counts addresses from the first byte of the block.
    let end = instructions.iter().skip(1).position(|insn| hit(insn.ip())).map_or(instructions.len(), |n| n + 1);
    instructions.truncate(end);
}

fn code_address(cpu: &mut Cpu, rip: u64) -> Exec<u64> {
    use crate::paging::AccessKind;
    use crate::state::seg;
    cpu.segment_address(seg::CS, rip, 1, AccessKind::Fetch)
}

/// The one way in which the CPU reads instructions; their addresses count from the first byte.
pub(super) fn decoder<'a>(bytes: &'a [u8], size: CodeSize, model: &Model) -> Decoder<'a> {
    let bits = match size {
        CodeSize::Bits16 => 16,
        CodeSize::Bits32 => 32,
        CodeSize::Bits64 => 64,
    };
    Decoder::with_ip(bits, bytes, 0, feature::options(model))
}

/// Decodes instructions that lie wholly in `bytes`, up to one that ends the block.
pub(crate) fn decode_page(bytes: &[u8], size: CodeSize, model: &Model) -> Vec<Instruction> {
    let mut decoder = decoder(bytes, size, model);
    let mut instructions = Vec::with_capacity(16);
    while instructions.len() < MAX_INSTRUCTIONS && decoder.can_decode() {
        let left = bytes.len() - decoder.position();
        let mut insn = decoder.decode();
        if insn.is_invalid() && truncated(&decoder, left) {
            break;
        }
        exchange_behind_rep(&mut insn, &bytes[bytes.len() - left..decoder.position()]);
        let in_shadow = instructions.last().is_some_and(|last: &Instruction| last.mnemonic() == Mnemonic::Sti);
        if !in_shadow || is_nop(&insn) {
            instructions.push(insn);
        }
        if in_shadow || ends_block(&insn) && insn.mnemonic() != Mnemonic::Sti {
            break;
        }
    }
    instructions
}

/// Whether `insn` does nothing at all. One behind STI belongs to its block, because nobody sees a shadow over it.
pub fn is_nop(insn: &Instruction) -> bool {
    insn.mnemonic() == Mnemonic::Nop
}

/// F3 REX.B 90 is XCHG with R8, to which the prefix means nothing; the decoder reads PAUSE.
fn exchange_behind_rep(insn: &mut Instruction, bytes: &[u8]) {
    let [prefixes @ .., rex @ 0x40..=0x4f, 0x90] = bytes else { return };
    if insn.code() != Code::Pause || rex & 1 == 0 {
        return;
    }
    let (code, r8, rax) = match (rex & 8 != 0, prefixes.contains(&0x66)) {
        (true, _) => (Code::Xchg_r64_RAX, Register::R8, Register::RAX),
        (false, true) => (Code::Xchg_r16_AX, Register::R8W, Register::AX),
        (false, false) => (Code::Xchg_r32_EAX, Register::R8D, Register::EAX),
    };
    insn.set_code(code);
    for (n, register) in [r8, rax].into_iter().enumerate() {
        insn.set_op_kind(n as u32, OpKind::Register);
        insn.set_op_register(n as u32, register);
    }
}

/// Whether an invalid instruction is invalid only because its bytes end.
fn truncated(decoder: &Decoder<'_>, left: usize) -> bool {
    decoder.last_error() == iced_x86::DecoderError::NoMoreBytes && left < MAX_LENGTH
}

fn ends_block(insn: &Instruction) -> bool {
    insn.flow_control() != FlowControl::Next || exec::ends_block(insn)
}

/// A block of the one instruction that crosses from this page into the next.
fn crossing(cpu: &mut Cpu, la: u64, head: &[u8], mut block: Block) -> Exec<Block> {
    let next = code_address(cpu, cpu.rip_at(head.len() as u64))?;
    debug_assert_eq!(la.wrapping_add(head.len() as u64) & PAGE_OFFSET, 0);
    let host = cpu.fetch_address(next)?;
    cpu.claim_code(host as u64);
    let mut bytes = [0u8; MAX_LENGTH];
    bytes[..head.len()].copy_from_slice(head);
    // SAFETY: `host` is the start of a translated page.
    unsafe { host.copy_to_nonoverlapping(bytes[head.len()..].as_mut_ptr(), MAX_LENGTH - head.len()) };
    let mut insn = decoder(&bytes, block.key.size, &cpu.model).decode();
    let length = insn.len();
    exchange_behind_rep(&mut insn, &bytes[..length]);
    block.fill(&[insn], &cpu.model);
    block.second_page = Some(host as u64);
    Ok(block)
}

/// The micro-op behind the last instruction of a block that ends without a branch.
fn fall_through(length: u32) -> Uop {
    Uop {
        run: exec::fall_through as Handler,
        imm: u64::from(length),
        disp: 0,
        code: 0,
        offset: length as u16,
        reg: [0; 3],
        base: 0,
        index: 0,
        segment_scale: 0,
        flags: 0,
        length: 0,
    }
}

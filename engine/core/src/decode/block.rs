//! Blocks: straight lines of micro-ops with one entry.

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, OpKind, Register};

use super::{lower, MAX_LENGTH};
use crate::cpu::{CodeSize, Cpu};
use crate::exec;
use crate::memory::{PAGE_OFFSET, PAGE_SIZE};
use crate::uop::{Exec, Handler, Uop};

/// Most instructions of a block.
pub const MAX_INSTRUCTIONS: usize = 64;

/// What a block's translation depends on besides its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Host address of the first byte.
    pub host: u64,
    pub size: CodeSize,
}

impl std::hash::Hash for CodeSize {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        state.write_u8(*self as u8);
    }
}

/// A decoded block. Its last micro-op is always one that leaves it.
pub struct Block {
    pub key: Key,
    /// One micro-op per instruction, and one more that falls through to what follows.
    pub uops: Box<[Uop]>,
    pub instructions: u32,
    /// Length in bytes.
    pub length: u32,
    /// Host page of the tail of an instruction that crosses into it.
    pub second_page: Option<u64>,
    pub valid: bool,
}

/// Decodes the block at the current RIP. A fetch fault of the first instruction is raised; one of a later instruction ends the block.
pub fn decode(cpu: &mut Cpu) -> Exec<Block> {
    let rip = cpu.rip();
    let la = code_address(cpu, rip)?;
    let host = cpu.fetch_address(la)?;
    let size = cpu.code_size;
    let left = (PAGE_SIZE - (la & PAGE_OFFSET)) as usize;
    // Guest RAM may change while we read it, so decode from a copy.
    let mut bytes = [0u8; MAX_INSTRUCTIONS * MAX_LENGTH];
    let available = left.min(bytes.len());
    // SAFETY: `host` is a translated page and `available` does not reach beyond it.
    unsafe { host.copy_to_nonoverlapping(bytes.as_mut_ptr(), available) };
    let mut block =
        Block { key: Key { host: host as u64, size }, uops: Box::default(), instructions: 0, length: 0, second_page: None, valid: true };
    let mut uops = Vec::with_capacity(16);
    decode_page(&bytes[..available], size, &mut uops, &mut block);
    if uops.is_empty() {
        return crossing(cpu, la, &bytes[..available], block);
    }
    uops.push(fall_through(block.length));
    block.uops = uops.into();
    Ok(block)
}

fn code_address(cpu: &mut Cpu, rip: u64) -> Exec<u64> {
    use crate::paging::AccessKind;
    use crate::state::seg;
    cpu.segment_address(seg::CS, rip, 1, AccessKind::Fetch)
}

fn decoder(bytes: &[u8], size: CodeSize) -> Decoder<'_> {
    let bits = match size {
        CodeSize::Bits16 => 16,
        CodeSize::Bits32 => 32,
        CodeSize::Bits64 => 64,
    };
    Decoder::with_ip(bits, bytes, 0, DecoderOptions::NONE)
}

/// Decodes instructions that lie wholly in `bytes`, up to one that ends the block.
fn decode_page(bytes: &[u8], size: CodeSize, uops: &mut Vec<Uop>, block: &mut Block) {
    let mut decoder = decoder(bytes, size);
    let mut insn = Instruction::default();
    while uops.len() < MAX_INSTRUCTIONS {
        decoder.decode_out(&mut insn);
        if insn.is_invalid() && truncated(&decoder, bytes.len() - block.length as usize) {
            break;
        }
        let start = block.length as usize;
        let end = start + insn.len();
        exchange_behind_rep(&mut insn, &bytes[start..end]);
        uops.push(lower(&insn, size));
        block.instructions += 1;
        block.length += insn.len() as u32;
        if ends_block(&insn) || block.length as usize == bytes.len() {
            break;
        }
    }
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
    let mut bytes = [0u8; MAX_LENGTH];
    bytes[..head.len()].copy_from_slice(head);
    // SAFETY: `host` is the start of a translated page.
    unsafe { host.copy_to_nonoverlapping(bytes[head.len()..].as_mut_ptr(), MAX_LENGTH - head.len()) };
    let mut insn = decoder(&bytes, block.key.size).decode();
    let length = insn.len();
    exchange_behind_rep(&mut insn, &bytes[..length]);
    block.instructions = 1;
    block.length = insn.len() as u32;
    block.second_page = Some(host as u64);
    block.uops = [lower(&insn, block.key.size), fall_through(block.length)].into();
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

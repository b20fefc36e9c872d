//! Programs from a seed: a loop of random instructions of every form that the model offers, with branches over some of them, and the state
//! in which it begins.

use iced_x86::{Code, FlowControl, Mnemonic, OpKind, Register};
use softkvm_engine::cpu::CodeSize;
use softkvm_engine::state::{cr0, cr4, efer, rights, seg, Segment, State};

use super::common::vector::{float80, lanes};
use super::common::Random;
use super::encode::{encode, Encoded};
use super::forms::{classify, family, Offers};

pub const CODE: u64 = 0x1_0000;
/// Two pages of operands, with none before them and none behind them.
pub const ARENA: u64 = 0x2_0000;
pub const ARENA_SIZE: u64 = 0x2000;
pub const STACK: u64 = 0x3_0000;
/// The loop's counter is a word here.
pub const COUNTER: u64 = 0x4_0000;
pub const TABLES: u64 = 0x5_0000;
/// How often the loop runs.
pub const TURNS: u32 = 24;

/// Forms that a program may have, by how often it has them.
pub struct Forms {
    pools: Vec<Vec<Code>>,
    /// Those whose flags can be made again.
    comparisons: Vec<Code>,
}

impl Forms {
    /// Forms of 64-bit code that stay in the program and ask nothing of the world outside.
    pub fn new(offers: &Offers) -> Self {
        let mut pools: std::collections::BTreeMap<&str, Vec<Code>> = std::collections::BTreeMap::new();
        for code in Code::values().filter(|code| classify(*code, CodeSize::Bits64, offers) == Some(Ok(())) && stays(*code)) {
            pools.entry(family(code)).or_default().push(code);
        }
        let compares = |code: &Code| {
            use Mnemonic::*;
            matches!(code.mnemonic(), Cmp | Test | Sub | Add | And | Or | Xor)
        };
        let pools: Vec<Vec<Code>> = pools.into_values().collect();
        let comparisons = pools.iter().flatten().copied().filter(compares).collect();
        Forms { pools, comparisons }
    }

    fn pick(&self, favourite: usize, random: &mut Random) -> Code {
        if random.below(5) == 0 {
            return self.comparisons[random.below(self.comparisons.len() as u64) as usize];
        }
        let pool = if random.below(2) == 0 { favourite % self.pools.len() } else { random.below(self.pools.len() as u64) as usize };
        self.pools[pool][random.below(self.pools[pool].len() as u64) as usize]
    }
}

fn stays(code: Code) -> bool {
    use Mnemonic::*;
    let form = code.op_code();
    let leaves = matches!(code.mnemonic(), Popf | Popfd | Popfq | Rdtsc | Rdtscp | Pause | Hlt | Enter | Leave | Xbegin);
    code.flow_control() == FlowControl::Next && !leaves && !form.must_be_cpl0() && !form.is_input_output() && !form.can_use_rep_prefix()
}

/// One instruction of a program: its bytes, or a branch over some that follow.
#[derive(Clone)]
enum Piece {
    Plain(Vec<u8>),
    Branch { condition: u8, over: usize },
}

impl Piece {
    fn length(&self) -> usize {
        match self {
            Piece::Plain(bytes) => bytes.len(),
            Piece::Branch { .. } => 2,
        }
    }
}

/// The body of a loop, and the register that its counter is looked at in, if not in memory.
#[derive(Clone)]
pub struct Program(Vec<Piece>, Option<u8>);

impl Program {
    /// Instructions of one turn of the loop.
    pub fn length(&self) -> u64 {
        self.0.len() as u64 + if self.1.is_some() { 4 } else { 2 }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (n, piece) in self.0.iter().enumerate() {
            match piece {
                Piece::Plain(plain) => bytes.extend(plain),
                Piece::Branch { condition, over } => {
                    let distance: usize = self.0[n + 1..].iter().take(*over).map(Piece::length).sum();
                    bytes.extend([0x70 | condition, distance as u8]);
                }
            }
        }
        // DEC dword [COUNTER]; JNZ to the start; HLT
        bytes.extend([0xff, 0x0c, 0x25]);
        bytes.extend((COUNTER as u32).to_le_bytes());
        if let Some(number) = self.1 {
            // MOV register, [COUNTER]; TEST register, register, in between
            let (low, high) = (number & 7, number >> 3);
            bytes.extend([0x40 | high << 2, 0x8b, 0x04 | low << 3, 0x25]);
            bytes.extend((COUNTER as u32).to_le_bytes());
            bytes.extend([0x40 | high << 2 | high, 0x85, 0xc0 | low << 3 | low]);
        }
        let back = -(bytes.len() as i32 + 6);
        bytes.extend([0x0f, 0x85]);
        bytes.extend(back.to_le_bytes());
        bytes.push(0xf4);
        bytes
    }

    /// The program without its instruction `n`, if it has so many.
    pub fn without(&self, n: usize) -> Option<Program> {
        let mut less = self.clone();
        (n < less.0.len()).then(|| less.0.remove(n))?;
        Some(less)
    }

    /// Takes out the instruction at `offset`; false if there is none.
    pub fn remove(&mut self, offset: u64) -> bool {
        let starts = self.0.iter().scan(0, |at, piece| Some(std::mem::replace(at, *at + piece.length() as u64)));
        let found = starts.enumerate().find(|(_, start)| *start == offset).map(|(n, _)| n);
        found.map(|n| self.0.remove(n)).is_some()
    }
}

pub fn program(forms: &Forms, random: &mut Random) -> Program {
    let favourite = random.next() as usize >> 8;
    let wanted = 6 + random.below(30) as usize;
    let mut pieces = Vec::new();
    while pieces.len() < wanted {
        if random.below(8) == 0 {
            pieces.push(Piece::Branch { condition: random.below(16) as u8, over: random.below(4) as usize });
        } else if let Some(mut encoded) = encode(forms.pick(favourite, random), 64, CODE, random) {
            aim(&mut encoded, random);
            pieces.push(Piece::Plain(encoded.bytes));
        }
    }
    // Any register but RSP.
    let counted = Some(random.below(16) as u8).filter(|number| random.below(2) == 0 && *number != 4);
    Program(pieces, counted)
}

/// Makes displacements small, and lets absolute and RIP-relative operands be in the arena. Registers point there (see [`state`]).
fn aim(encoded: &mut Encoded, random: &mut Random) {
    let insn = &encoded.insn;
    if !(0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory) || encoded.offsets.displacement_size() == 0 {
        return;
    }
    let place = random.below(ARENA_SIZE + 64) & if random.below(4) == 0 { !0 } else { !31 };
    let absolute = insn.memory_base() == Register::None;
    let relative = insn.is_ip_rel_memory_operand();
    encoded.patch_displacement(match (absolute, relative) {
        (true, _) => ARENA + place,
        // Where the instruction is, is known to some tens of bytes only.
        (_, true) => (ARENA + place).wrapping_sub(CODE),
        _ if encoded.offsets.displacement_size() == 1 => random.next() & 0x70,
        _ => place & 0x3e0,
    });
}

/// A process in 64-bit mode: registers are places in the arena, indices or anything; vector and x87 registers hold numbers of all kinds.
pub fn state(random: &mut Random) -> State {
    let mut state = State::default();
    let data = rights::PRESENT | rights::S | rights::RW | rights::ACCESSED | rights::GRANULARITY | 3 << rights::DPL_SHIFT;
    for number in 0..6 {
        let kind = if number == seg::CS { rights::CODE | rights::LONG } else { rights::DB };
        state.segments[number] = Segment::new(0x2b, data | kind, u32::MAX, 0);
    }
    state.segments[seg::TR] = Segment::new(24, rights::PRESENT | 11, 0x67, 0x1000);
    state.segments[seg::LDTR] = Segment::new(0, rights::UNUSABLE, 0, 0);
    state.segments[seg::GS].base = random.below(64);
    let rarely = |random: &mut Random, bit: u64| if random.below(24) == 0 { bit } else { 0 };
    state.cr0 =
        cr0::PE | cr0::PG | cr0::ET | cr0::NE | cr0::WP | rarely(random, cr0::TS) | rarely(random, cr0::EM) | rarely(random, cr0::AM);
    state.cr4 = cr4::PAE | cr4::OSXMMEXCPT | cr4::FSGSBASE;
    state.cr4 |= (cr4::OSFXSR | cr4::OSXSAVE) & !rarely(random, cr4::OSFXSR) & !rarely(random, cr4::OSXSAVE);
    state.xcr0 = if random.below(16) == 0 { 3 } else { 7 };
    state.efer = efer::LME | efer::LMA | efer::NXE;
    state.cr3 = TABLES;
    state.rip = CODE;
    state.rflags = 0x202 | random.next() & 0x8d5;
    for register in &mut state.gpr {
        *register = match random.below(8) {
            0 => random.operand(),
            1 => random.below(64),
            2 => ARENA + ARENA_SIZE - random.below(80),
            3 => ARENA + random.below(ARENA_SIZE),
            _ => ARENA + 64 * random.below(ARENA_SIZE / 64),
        };
    }
    state.gpr[4] = STACK + 0x800;
    let fpu = &mut state.fpu;
    fpu.mxcsr = 0x1f80 | if random.below(3) == 0 { random.next() as u32 & 0xe07f } else { 0 };
    if random.below(10) == 0 {
        fpu.mxcsr &= !(random.next() as u32 & 0x1f80);
    }
    fpu.fcw = 0x37f | if random.below(3) == 0 { random.next() as u16 & 0xf00 } else { 0 };
    if random.below(10) == 0 {
        fpu.fcw &= !(random.next() as u16 & 0x3f);
    }
    fpu.fsw = (random.next() as u16) & 0x7f00;
    fpu.ftw = if random.below(2) == 0 { 0 } else { random.next() as u8 };
    let wide = random.below(2) == 0;
    for register in &mut fpu.vector[..16] {
        for word in register[..if wide { 32 } else { 16 }].chunks_exact_mut(8) {
            word.copy_from_slice(&lanes(random).to_le_bytes());
        }
    }
    for register in &mut fpu.st {
        register[..10].copy_from_slice(&float80(random));
    }
    state
}

/// What is in the arena.
pub fn operands(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(ARENA_SIZE as usize);
    while bytes.len() < ARENA_SIZE as usize {
        let word = if random.below(4) == 0 { ARENA + random.below(ARENA_SIZE) } else { lanes(random) };
        bytes.extend(word.to_le_bytes());
    }
    bytes
}

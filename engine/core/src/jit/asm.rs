//! A small assembler for what translations are made of: it writes bytes at once, and distances to labels when these are set. For the
//! guest's own instructions, with other operands, there is iced's encoder.
//!
//! Source: SDM vol. 2, ch. 2 (instruction format) and the opcode of each instruction.

use iced_x86::{ConditionCode, Encoder, IcedError, Instruction, OpKind, Register};

/// A place in the code, which jumps may name before it is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Label(u32);

/// A memory operand: base + index * scale + displacement, of so many bytes. With RIP as its base it is that far from the start of the code,
/// and no immediate may follow it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Memory {
    pub bytes: u8,
    pub base: Register,
    pub index: Register,
    pub scale: u8,
    pub displacement: i32,
}

impl Memory {
    /// The operand with `index * scale` added to its address.
    pub const fn index(self, index: Register, scale: u8) -> Self {
        Memory { index, scale, ..self }
    }

    /// `bytes` bytes at the same address.
    pub const fn of(self, bytes: usize) -> Self {
        Memory { bytes: bytes as u8, ..self }
    }
}

/// `bytes` bytes at `base + displacement`; the base may be `Register::None`.
const fn memory(bytes: u8, base: Register, displacement: i32) -> Memory {
    Memory { bytes, base, index: Register::None, scale: 1, displacement }
}

pub const fn byte_ptr(base: Register, displacement: i32) -> Memory {
    memory(1, base, displacement)
}
pub const fn word_ptr(base: Register, displacement: i32) -> Memory {
    memory(2, base, displacement)
}
pub const fn dword_ptr(base: Register, displacement: i32) -> Memory {
    memory(4, base, displacement)
}
pub const fn qword_ptr(base: Register, displacement: i32) -> Memory {
    memory(8, base, displacement)
}

/// What an instruction works on.
#[derive(Clone, Copy)]
pub enum Operand {
    Register(Register),
    Memory(Memory),
    Immediate(i64),
}

impl From<Register> for Operand {
    fn from(register: Register) -> Self {
        Operand::Register(register)
    }
}

impl Operand {
    /// Bytes of a register or of memory.
    fn bytes(self) -> u8 {
        match self {
            Operand::Register(register) => register.size() as u8,
            Operand::Memory(memory) => memory.bytes,
            Operand::Immediate(_) => unreachable!("an immediate is no target"),
        }
    }
}

impl From<Memory> for Operand {
    fn from(memory: Memory) -> Self {
        Operand::Memory(memory)
    }
}

impl From<i32> for Operand {
    fn from(value: i32) -> Self {
        Operand::Immediate(value.into())
    }
}

impl From<u64> for Operand {
    fn from(value: u64) -> Self {
        Operand::Immediate(value as i64)
    }
}

/// Where a jump goes: to a label, or to an address at most 2 GB away.
#[derive(Clone, Copy)]
pub enum Target {
    Label(Label),
    Address(u64),
}

impl From<Label> for Target {
    fn from(label: Label) -> Self {
        Target::Label(label)
    }
}

impl From<u64> for Target {
    fn from(address: u64) -> Self {
        Target::Address(address)
    }
}

/// A NOP as long as a JMP, and the JMP's opcode, which has a distance of 32 bits behind it.
pub const NO_JUMP: [u8; 5] = [0x0f, 0x1f, 0x44, 0, 0];
pub const JUMP: u8 = 0xe9;

const UNSET: u32 = u32::MAX;
const REX: u8 = 0x40;

/// An operand of a ModRM byte that is a register: its number, its bytes, and whether it has no name without a REX prefix.
#[derive(Clone, Copy)]
struct Field {
    number: u8,
    bytes: u8,
    rex: bool,
}

impl Field {
    fn of(register: Register) -> Self {
        let bytes = register.size() as u8;
        let number = register.number() as u8;
        match (bytes, number) {
            // iced counts AL CL DL BL AH CH DH BH SPL BPL SIL DIL R8L ...
            (1, 8..) => Field { number: number - 4, bytes, rex: true },
            _ => Field { number, bytes, rex: false },
        }
    }

    /// The extension of an opcode in the place of a register.
    const fn extension(number: u8) -> Self {
        Field { number, bytes: 0, rex: false }
    }
}

/// Code in the making, and the place where it is going to run.
pub struct Asm {
    bytes: Vec<u8>,
    start: u64,
    labels: Vec<u32>,
    /// Ends of 32-bit distances to labels that were not set yet.
    missing: Vec<(u32, Label)>,
    /// Nothing that was written since [`Asm::hold`] may have changed R13 or R15.
    holds: bool,
    encoder: Encoder,
}

impl Default for Asm {
    fn default() -> Self {
        Asm { bytes: Vec::with_capacity(4096), start: 0, labels: Vec::new(), missing: Vec::new(), holds: false, encoder: Encoder::new(64) }
    }
}

impl Asm {
    /// Begins code that is going to run at `start`.
    pub fn begin(&mut self, start: u64) {
        self.bytes.clear();
        self.labels.clear();
        self.missing.clear();
        self.holds = false;
        self.start = start;
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn create_label(&mut self) -> Label {
        self.labels.push(UNSET);
        Label(self.labels.len() as u32 - 1)
    }

    /// Whoever comes here has in R13 and R15 what somebody relies on, as long as [`Asm::holds`] says so.
    pub fn hold(&mut self) {
        self.holds = true;
    }

    pub fn holds(&self) -> bool {
        self.holds
    }

    /// An instruction with a register as an operand, which it may change.
    fn touch(&mut self, number: u8) {
        self.holds &= !matches!(number, 13 | 15);
    }

    /// Sets `label` here, where one may come from anywhere.
    pub fn set_label(&mut self, label: Label) {
        self.holds = false;
        self.labels[label.0 as usize] = self.bytes.len() as u32;
    }

    /// Distance of a label that was set from the first byte.
    pub fn offset(&self, label: Label) -> usize {
        debug_assert_ne!(self.labels[label.0 as usize], UNSET);
        self.labels[label.0 as usize] as usize
    }

    /// The code, whose labels are all set.
    pub fn finish(&mut self) -> &[u8] {
        for (end, label) in self.missing.drain(..) {
            let target = self.labels[label.0 as usize];
            debug_assert_ne!(target, UNSET);
            let distance = target.wrapping_sub(end);
            self.bytes[end as usize - 4..end as usize].copy_from_slice(&distance.to_le_bytes());
        }
        &self.bytes
    }

    /// An instruction of any kind without a distance in it.
    pub fn add_instruction(&mut self, instruction: &Instruction) -> Result<(), IcedError> {
        let registers = (0..instruction.op_count()).filter(|n| instruction.op_kind(*n) == OpKind::Register);
        registers.map(|n| instruction.op_register(n)).filter(|register| register.is_gpr()).for_each(|register| {
            self.touch(register.full_register().number() as u8);
        });
        self.encoder.set_buffer(std::mem::take(&mut self.bytes));
        let result = self.encoder.encode(instruction, 0);
        self.bytes = self.encoder.take_buffer();
        result.map(drop)
    }

    /// [`Asm::add_instruction`] for one that is the same each time, and so known to be well formed.
    pub fn must_add(&mut self, instruction: Result<Instruction, IcedError>) {
        let done = instruction.and_then(|instruction| self.add_instruction(&instruction));
        done.unwrap_or_else(|error| unreachable!("shared code is well formed: {error}"));
    }

    // ---- encoding -------------------------------------------------------------------------------------------------------------------

    fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Prefixes, opcode and operands: `reg` in ModRM.reg, and `rm` in the rest of it. An immediate may follow.
    fn operands(&mut self, bytes: u8, opcode: &[u8], reg: Field, rm: Operand) {
        let mut rex = (reg.number & 8) >> 1 | if bytes == 8 { 8 } else { 0 };
        let mut named = reg.rex;
        self.touch(reg.number);
        match rm {
            Operand::Register(register) => {
                let field = Field::of(register);
                self.touch(field.number);
                rex |= field.number >> 3;
                named |= field.rex;
            }
            Operand::Memory(memory) => rex |= high(memory.base) | high(memory.index) << 1,
            Operand::Immediate(_) => unreachable!("ModRM has no immediates"),
        }
        if bytes == 2 {
            self.bytes.push(0x66);
        }
        if rex != 0 || named {
            self.bytes.push(REX | rex);
        }
        self.put(opcode);
        match rm {
            Operand::Register(register) => self.bytes.push(0xc0 | (reg.number & 7) << 3 | Field::of(register).number & 7),
            Operand::Memory(memory) => self.address(reg.number & 7, &memory),
            Operand::Immediate(_) => {}
        }
    }

    /// ModRM, SIB and displacement of an address.
    fn address(&mut self, reg: u8, memory: &Memory) {
        const SIB: u8 = 4;
        const RBP: u8 = 5;
        let reg = reg << 3;
        if memory.base == Register::RIP {
            self.bytes.push(reg | RBP);
            let end = self.bytes.len() as i32 + 4;
            return self.put(&(memory.displacement - end).to_le_bytes());
        }
        let index = if memory.index == Register::None { SIB } else { memory.index.number() as u8 & 7 };
        debug_assert_ne!(memory.index, Register::RSP);
        let scale = (memory.scale.trailing_zeros() as u8) << 6;
        if memory.base == Register::None {
            self.put(&[reg | SIB, scale | index << 3 | RBP]);
            return self.put(&memory.displacement.to_le_bytes());
        }
        let base = memory.base.number() as u8 & 7;
        let short = i8::try_from(memory.displacement).ok();
        let form = match short {
            Some(0) if base != RBP => 0,
            Some(_) => 0x40,
            None => 0x80,
        };
        if memory.index != Register::None || base == SIB {
            self.put(&[form | reg | SIB, scale | index << 3 | base]);
        } else {
            self.bytes.push(form | reg | base);
        }
        match (form, short) {
            (0, _) => {}
            (_, Some(short)) => self.bytes.push(short as u8),
            (_, None) => self.put(&memory.displacement.to_le_bytes()),
        }
    }

    /// An instruction whose opcode has bit 0 set for operands of more than a byte.
    fn sized(&mut self, bytes: u8, opcode: u8, reg: Field, rm: Operand) {
        self.operands(bytes, &[opcode | u8::from(bytes > 1)], reg, rm);
    }

    /// An immediate as wide as operands of `bytes`, but no wider than 4 bytes.
    fn immediate(&mut self, bytes: u8, value: i64) {
        debug_assert!(bytes < 8 || i32::try_from(value).is_ok());
        self.put(&value.to_le_bytes()[..bytes.min(4) as usize]);
    }

    // ---- moves ----------------------------------------------------------------------------------------------------------------------

    pub fn mov(&mut self, to: impl Into<Operand>, from: impl Into<Operand>) {
        match (to.into(), from.into()) {
            (Operand::Register(to), Operand::Immediate(value)) => self.mov_immediate(Field::of(to), value),
            (Operand::Memory(to), Operand::Immediate(value)) => {
                self.sized(to.bytes, 0xc6, Field::extension(0), to.into());
                self.immediate(to.bytes, value);
            }
            (to, Operand::Register(from)) => {
                let field = Field::of(from);
                self.sized(field.bytes, 0x88, field, to);
            }
            (Operand::Register(to), from) => {
                let field = Field::of(to);
                self.sized(field.bytes, 0x8a, field, from);
            }
            (Operand::Immediate(_), _) | (Operand::Memory(_), Operand::Memory(_)) => unreachable!("no such MOV"),
        }
    }

    fn mov_immediate(&mut self, to: Field, value: i64) {
        self.touch(to.number);
        let (low, rex) = (to.number & 7, to.number >> 3);
        match to.bytes {
            1 => {
                debug_assert!(!to.rex && to.number < 8);
                self.put(&[0xb0 | low, value as u8]);
            }
            8 if u32::try_from(value).is_err() && i32::try_from(value).is_ok() => {
                self.put(&[REX | 8 | rex, 0xc7, 0xc0 | low]);
                self.immediate(4, value);
            }
            8 if u32::try_from(value).is_err() => {
                self.put(&[REX | 8 | rex, 0xb8 | low]);
                self.put(&value.to_le_bytes());
            }
            _ => {
                debug_assert!(to.bytes >= 4);
                if rex != 0 {
                    self.bytes.push(REX | rex);
                }
                self.bytes.push(0xb8 | low);
                self.immediate(4, value);
            }
        }
    }

    /// MOV of an immediate that has all its 8 bytes, whatever it is.
    pub fn mov_wide(&mut self, to: Register, value: u64) {
        let number = Field::of(to).number;
        self.touch(number);
        self.put(&[REX | 8 | number >> 3, 0xb8 | number & 7]);
        self.put(&value.to_le_bytes());
    }

    /// MOVZX to a 32-bit register.
    pub fn movzx(&mut self, to: Register, from: Memory) {
        debug_assert!(to.size() == 4 && from.bytes <= 2);
        self.operands(4, &[0x0f, 0xb6 | u8::from(from.bytes == 2)], Field::of(to), from.into());
    }

    pub fn lea(&mut self, to: Register, from: Memory) {
        let field = Field::of(to);
        self.operands(field.bytes, &[0x8d], field, from.into());
    }

    pub fn push(&mut self, register: Register) {
        self.operands(4, &[0xff], Field::extension(6), register.into());
    }

    pub fn pop(&mut self, register: Register) {
        self.operands(4, &[0x8f], Field::extension(0), register.into());
    }

    // ---- arithmetic -----------------------------------------------------------------------------------------------------------------

    /// One of the eight operations that share their forms.
    fn alu(&mut self, number: u8, to: Operand, from: Operand) {
        match (to, from) {
            (to, Operand::Immediate(value)) => {
                let bytes = to.bytes();
                if bytes > 1 && i8::try_from(value).is_ok() {
                    self.operands(bytes, &[0x83], Field::extension(number), to);
                    self.bytes.push(value as u8);
                } else {
                    self.sized(bytes, 0x80, Field::extension(number), to);
                    self.immediate(bytes, value);
                }
            }
            (to, Operand::Register(from)) => {
                let field = Field::of(from);
                self.sized(field.bytes, number << 3, field, to);
            }
            (Operand::Register(to), from) => {
                let field = Field::of(to);
                self.sized(field.bytes, number << 3 | 2, field, from);
            }
            _ => unreachable!("no such operation"),
        }
    }

    pub fn add(&mut self, to: impl Into<Operand>, from: impl Into<Operand>) {
        self.alu(0, to.into(), from.into());
    }
    pub fn or(&mut self, to: impl Into<Operand>, from: impl Into<Operand>) {
        self.alu(1, to.into(), from.into());
    }
    pub fn and(&mut self, to: impl Into<Operand>, from: impl Into<Operand>) {
        self.alu(4, to.into(), from.into());
    }
    pub fn sub(&mut self, to: impl Into<Operand>, from: impl Into<Operand>) {
        self.alu(5, to.into(), from.into());
    }
    pub fn xor(&mut self, to: impl Into<Operand>, from: impl Into<Operand>) {
        self.alu(6, to.into(), from.into());
    }
    pub fn cmp(&mut self, to: impl Into<Operand>, from: impl Into<Operand>) {
        self.alu(7, to.into(), from.into());
    }

    /// TEST of a register with a register, or of anything with an immediate.
    pub fn test(&mut self, operand: impl Into<Operand>, with: impl Into<Operand>) {
        match (operand.into(), with.into()) {
            (operand, Operand::Immediate(value)) => {
                let bytes = operand.bytes();
                self.sized(bytes, 0xf6, Field::extension(0), operand);
                self.immediate(bytes, value);
            }
            (operand, Operand::Register(with)) => {
                let field = Field::of(with);
                self.sized(field.bytes, 0x84, field, operand);
            }
            (_, Operand::Memory(_)) => unreachable!("no such TEST"),
        }
    }

    pub fn inc(&mut self, memory: Memory) {
        self.sized(memory.bytes, 0xfe, Field::extension(0), memory.into());
    }

    fn shift(&mut self, number: u8, register: Register, count: u8) {
        self.sized(register.size() as u8, 0xc0, Field::extension(number), register.into());
        self.bytes.push(count);
    }
    pub fn rol(&mut self, register: Register, count: u8) {
        self.shift(0, register, count);
    }
    pub fn shl(&mut self, register: Register, count: u8) {
        self.shift(4, register, count);
    }
    pub fn shr(&mut self, register: Register, count: u8) {
        self.shift(5, register, count);
    }
    pub fn sar(&mut self, register: Register, count: u8) {
        self.shift(7, register, count);
    }

    // ---- flags ----------------------------------------------------------------------------------------------------------------------

    pub fn lahf(&mut self) {
        self.bytes.push(0x9f);
    }
    pub fn sahf(&mut self) {
        self.bytes.push(0x9e);
    }
    pub fn setcc(&mut self, condition: ConditionCode, register: Register) {
        debug_assert_ne!(condition, ConditionCode::None);
        self.operands(1, &[0x0f, 0x90 | (condition as u8 - 1)], Field::extension(0), register.into());
    }

    // ---- jumps ----------------------------------------------------------------------------------------------------------------------

    fn distance(&mut self, target: Target) {
        let end = self.bytes.len() as u32 + 4;
        let distance = match target {
            Target::Label(label) => match self.labels[label.0 as usize] {
                UNSET => {
                    self.missing.push((end, label));
                    0
                }
                offset => offset.wrapping_sub(end) as i32,
            },
            Target::Address(address) => {
                let distance = address.wrapping_sub(self.start).wrapping_sub(end.into()) as i64;
                debug_assert!(i32::try_from(distance).is_ok());
                distance as i32
            }
        };
        self.put(&distance.to_le_bytes());
    }

    /// What stands in the place of a JMP that is to be written later.
    pub fn no_jump(&mut self) {
        self.put(&NO_JUMP);
    }

    pub fn jmp(&mut self, target: impl Into<Target>) {
        self.bytes.push(JUMP);
        self.distance(target.into());
    }

    /// JMP to the address in a register or in memory.
    pub fn jmp_indirect(&mut self, target: impl Into<Operand>) {
        self.operands(4, &[0xff], Field::extension(4), target.into());
    }

    pub fn call(&mut self, target: impl Into<Target>) {
        self.holds = false;
        self.bytes.push(0xe8);
        self.distance(target.into());
    }

    /// CALL to the address in a register or in memory.
    pub fn call_indirect(&mut self, target: impl Into<Operand>) {
        self.holds = false;
        self.operands(4, &[0xff], Field::extension(2), target.into());
    }

    pub fn ret(&mut self) {
        self.bytes.push(0xc3);
    }

    pub fn jcc(&mut self, condition: ConditionCode, target: impl Into<Target>) {
        debug_assert_ne!(condition, ConditionCode::None);
        self.put(&[0x0f, 0x80 | (condition as u8 - 1)]);
        self.distance(target.into());
    }

    pub fn je(&mut self, target: impl Into<Target>) {
        self.jcc(ConditionCode::e, target);
    }
    pub fn jne(&mut self, target: impl Into<Target>) {
        self.jcc(ConditionCode::ne, target);
    }
}

/// Bit 3 of a register's number.
fn high(register: Register) -> u8 {
    if matches!(register, Register::None | Register::RIP) {
        0
    } else {
        register.number() as u8 >> 3
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::Register::*;
    use iced_x86::{Decoder, DecoderOptions, OpKind};

    use super::*;

    const GENERAL: [Register; 16] = [RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15];
    const START: u64 = 0x10_0000;

    /// What iced reads in the code that `write` makes, each instruction in its own words: mnemonic, operands, immediates.
    fn decoded(write: impl FnOnce(&mut Asm)) -> Vec<Instruction> {
        let mut a = Asm::default();
        a.begin(START);
        write(&mut a);
        let code = a.finish().to_vec();
        let all: Vec<_> = Decoder::with_ip(64, &code, START, DecoderOptions::NONE).into_iter().collect();
        assert!(all.iter().all(|insn| !insn.is_invalid()), "{code:02x?}");
        all
    }

    fn one(write: impl FnOnce(&mut Asm)) -> Instruction {
        let all = decoded(write);
        assert_eq!(all.len(), 1);
        all[0]
    }

    fn name(insn: &Instruction) -> String {
        format!("{:?}", insn.code())
    }

    #[test]
    fn every_address_is_what_it_says() {
        let with_none = |registers: &[Register]| [&[Register::None], registers].concat();
        for base in with_none(&GENERAL) {
            for index in with_none(&GENERAL).into_iter().filter(|index| *index != RSP) {
                for displacement in [0, 1, -128, 127, 128, -129, i32::MAX, i32::MIN] {
                    let insn = one(|a| a.mov(R9, qword_ptr(base, displacement).index(index, 4)));
                    let place = (insn.op0_register(), insn.memory_base(), insn.memory_index(), insn.memory_displacement64() as i64);
                    assert_eq!(place, (R9, base, index, displacement.into()));
                    assert!(index == Register::None || insn.memory_index_scale() == 4);
                }
            }
        }
    }

    #[test]
    fn every_register_of_every_width_has_its_name() {
        let bytes = [AL, CL, DL, BL, SPL, BPL, SIL, DIL, R8L, R9L, R10L, R11L, R12L, R13L, R14L, R15L];
        for (n, byte) in (0u32..).zip(bytes) {
            for register in [byte, AX + n, EAX + n, RAX + n] {
                for (write, suffix) in [(true, "store"), (false, "load")] {
                    let insn = one(|a| match write {
                        true => a.mov(memory(register.size() as u8, RDI, 8), register),
                        false => a.mov(register, memory(register.size() as u8, RDI, 8)),
                    });
                    assert_eq!(insn.op_register(u32::from(write)), register, "{suffix}");
                    assert_eq!(insn.memory_size().size(), register.size());
                }
                let other = if register.size() == 1 { R9L } else { AX + 9 + 16 * (register.size().trailing_zeros() - 1) };
                let insn = one(|a| a.xor(register, other));
                assert_eq!((insn.op0_register(), insn.op1_register()), (register, other));
            }
        }
        for high in [AH, CH, DH, BH] {
            let insn = one(|a| a.or(high, AL));
            assert_eq!((insn.op0_register(), insn.op1_register()), (high, AL));
        }
    }

    #[test]
    fn immediates_are_kept_in_the_shortest_form() {
        for (value, bytes) in [(0, 5), (0xffff_ffff, 5), (0x1_0000_0000, 10), (-1i64 as u64, 7), (1 << 63, 10)] {
            let insn = one(|a| a.mov(RCX, value));
            assert_eq!((insn.immediate(1), insn.len()), (value, bytes), "{value:#x}");
        }
        for (value, bytes) in [(1, 4), (-128, 4), (128, 7), (i32::MIN, 7)] {
            let insn = one(|a| a.cmp(R13, value));
            assert_eq!((insn.immediate(1) as i64, insn.len()), (value.into(), bytes));
        }
        let store = one(|a| a.mov(qword_ptr(R14, 0), -2));
        assert_eq!((name(&store), store.immediate(1) as i64), ("Mov_rm64_imm32".into(), -2));
        assert_eq!(one(|a| a.mov(byte_ptr(R14, 0), 5)).immediate(1), 5);
        assert_eq!(one(|a| a.and(AH, !0x10)).immediate(1), 0xef);
        assert_eq!(one(|a| a.test(R14L, 7)).immediate(1), 7);
    }

    #[test]
    fn operations_are_the_named_ones() {
        let all = decoded(|a| {
            a.add(R14, qword_ptr(RBP, 8));
            a.or(dword_ptr(RBP, 8), EAX);
            a.and(R13D, 0x7fe0);
            a.sub(qword_ptr(RBP, 0x400), 5);
            a.mov_wide(R13, 1);
            a.shr(R13D, 7);
            a.shl(R14D, 5);
            a.rol(AL, 1);
            a.lea(R12, qword_ptr(R12, -8));
            a.movzx(EAX, word_ptr(RBP, 2));
            a.movzx(R13D, byte_ptr(RBP, 2));
            a.setcc(ConditionCode::o, AL);
            a.lahf();
            a.sahf();
            a.push(R12);
            a.pop(RBX);
            a.test(EAX, EAX);
            a.test(dword_ptr(RBP, 8), 1);
            a.ret();
        });
        let names = "Add_r64_rm64 Or_rm32_r32 And_rm32_imm32 Sub_rm64_imm8 Mov_r64_imm64 Shr_rm32_imm8 Shl_rm32_imm8 Rol_rm8_imm8 Lea_r64_m Movzx_r32_rm16 \
                     Movzx_r32_rm8 Seto_rm8 Lahf Sahf Push_rm64 Pop_rm64 Test_rm32_r32 Test_rm32_imm32 Retnq";
        assert_eq!(all.iter().map(name).collect::<Vec<_>>().join(" "), names);
    }

    #[test]
    fn jumps_reach_their_labels_and_addresses() {
        let all = decoded(|a| {
            let (back, ahead) = (a.create_label(), a.create_label());
            a.set_label(back);
            a.jcc(ConditionCode::g, ahead);
            a.jmp(back);
            a.call(START - 0x1000);
            a.set_label(ahead);
            a.je(START + 0x1000);
            a.jmp_indirect(R13);
            a.call_indirect(qword_ptr(RBP, 8));
        });
        assert_eq!(all[0].near_branch_target(), all[3].ip());
        assert_eq!(all[0].condition_code(), ConditionCode::g);
        assert_eq!(all[1].near_branch_target(), START);
        assert_eq!(all[2].near_branch_target(), START - 0x1000);
        assert_eq!((all[3].condition_code(), all[3].near_branch_target()), (ConditionCode::e, START + 0x1000));
        assert_eq!((all[4].op0_register(), all[5].op0_kind()), (R13, OpKind::Memory));
        assert_eq!((name(&all[4]), name(&all[5])), ("Jmp_rm64".into(), "Call_rm64".into()));
    }

    #[test]
    fn other_instructions_come_from_iced() {
        let popcnt = Decoder::new(64, &[0xf3, 0x48, 0x0f, 0xb8, 0xc1], DecoderOptions::NONE).decode();
        assert_eq!(one(|a| a.add_instruction(&popcnt).unwrap()), popcnt);
        assert!(Asm::default().add_instruction(&Instruction::default()).is_err());
    }
}

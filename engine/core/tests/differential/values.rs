//! Registers and operands of a comparison: edges of integers and floating-point numbers, and pointers to every kind of page.

use iced_x86::{Instruction, InstructionInfo, InstructionInfoFactory, Mnemonic, OpKind, Register};
use softkvm_engine::state::rflags;

use super::arena::{DATA_OFFSET, DATA_SIZE, READ_ONLY_OFFSET};
use super::common::vector::{float80, lanes};
use super::common::Random;
use super::encode::Encoded;
use super::image::Image;
use super::mode::Mode;

const PAGE: u64 = 4096;
/// Distance of branch targets from the instruction: outside of it, and inside its page.
const NEAR: u64 = 0x60;
const FAR: u64 = 0x380;

/// Where things are in the segments of the code: CS, DS and, for `stack`, SS.
#[derive(Clone, Copy)]
pub struct Places {
    pub slot: u64,
    pub data: u64,
    pub stack: u64,
    pub mode: Mode,
}

impl Places {
    pub fn new(mode: Mode) -> Self {
        let linear = mode.arena + DATA_OFFSET;
        Places { slot: mode.slot(), data: linear - mode.data().base, stack: linear, mode }
    }

    /// Where the operands are in `segment`.
    fn base(&self, segment: Register) -> u64 {
        if segment == Register::SS {
            self.stack
        } else {
            self.data
        }
    }

    /// An address for an operand: mostly plain memory; rarely the last bytes before a guard page, a page that cannot be written, a
    /// non-canonical address, or anything.
    fn operand(&self, random: &mut Random) -> u64 {
        let inside = self.data + 64 + random.below(DATA_SIZE as u64 - 1200);
        match random.below(40) {
            0 => self.data + DATA_SIZE as u64 - random.below(80),
            1 => self.data.wrapping_sub(random.below(80)),
            2 => self.data + READ_ONLY_OFFSET + (random.below(PAGE - 64) & !31),
            3 => 0x0000_8000_0000_0000 + random.below(64),
            4 => random.next(),
            5..=7 => self.data + PAGE - random.below(40),
            8..=13 => inside,
            14..=17 => inside & !7,
            _ => inside & !63,
        }
    }

    /// An address for a branch: INT3s around the instruction, or what cannot be executed.
    pub fn target(&self, random: &mut Random) -> u64 {
        match random.below(24) {
            0 => 0x8000_0000_0000_0000 | random.next(),
            1 => self.data.wrapping_sub(1 + random.below(64)),
            n if n % 2 == 0 => self.slot + NEAR + random.below(FAR - NEAR),
            _ => self.slot - 1 - random.below(FAR),
        }
    }
}

/// Fixes the parts of an encoding that are addresses: branch distances, RIP-relative and absolute displacements.
pub fn aim(encoded: &mut Encoded, places: &Places, random: &mut Random) {
    match encoded.branch_width() {
        Some(1) => encoded.patch_branch(if random.below(2) == 0 { places.slot + 0x60 } else { places.slot - 1 - random.below(0x60) }),
        Some(_) => encoded.patch_branch(places.slot - 1 - random.below(FAR)),
        None => {}
    }
    let insn = encoded.insn;
    if !(0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory) {
        return;
    }
    let absolute = insn.memory_base() == Register::None && insn.memory_index() == Register::None;
    if insn.is_ip_rel_memory_operand() {
        let target = places.data + random.below(DATA_SIZE as u64 - 64);
        encoded.patch_displacement(target.wrapping_sub(insn.next_ip()));
    } else if absolute && encoded.offsets.has_displacement() {
        encoded.patch_displacement(places.base(insn.memory_segment()) + random.below(DATA_SIZE as u64 - 64));
    }
    if let Some(again) = super::encode::decode(encoded.bytes.clone(), places.mode.bits(), insn.ip()) {
        *encoded = again;
    }
}

/// Makes states for one instruction.
pub struct Values {
    factory: InstructionInfoFactory,
    places: Places,
}

impl Values {
    pub fn new(places: Places) -> Self {
        Values { factory: InstructionInfoFactory::new(), places }
    }

    /// Changes what the instruction reads: its registers, flags and memory operands. The rest stays as the last instruction left it.
    pub fn fill(&mut self, insn: &Instruction, image: &mut Image, memory: &mut [u8], random: &mut Random) {
        let info = self.factory.info(insn);
        image.fault = None;
        image.rflags = rflags::FIXED | rflags::IF | random.next() & (rflags::ARITHMETIC | rflags::DF);
        for used in info.used_registers() {
            set_register(used.register(), image, random);
        }
        for _ in 0..2 {
            image.gpr[random.below(16) as usize] = random.operand();
        }
        control_words(insn, image, random);
        limits(insn, image, random);
        let mut targets = point(info, insn, &self.places, image, random);
        if insn.is_stack_instruction() {
            image.gpr[4] = stack_pointer(image.gpr[4], &self.places, random);
            targets.push(image.gpr[4].wrapping_sub(self.places.stack));
        }
        for at in targets {
            self.poke(insn, at, memory, random);
        }
        if insn.is_jmp_near_indirect() || insn.is_call_near_indirect() {
            if insn.op0_kind() == OpKind::Register {
                image.gpr[insn.op0_register().number()] = self.places.target(random);
            }
        } else if insn.mnemonic() == Mnemonic::Ret {
            let rsp = image.gpr[4];
            let target = self.places.target(random);
            store(memory, rsp.wrapping_sub(self.places.stack), target);
        }
        image.gpr.iter_mut().for_each(|register| *register &= self.places.mode.mask());
    }

    /// Writes an operand that fits the instruction to the place `at` of memory.
    fn poke(&self, insn: &Instruction, at: u64, memory: &mut [u8], random: &mut Random) {
        if insn.is_jmp_near_indirect() || insn.is_call_near_indirect() {
            store(memory, at, self.places.target(random));
        } else if insn.mnemonic() == Mnemonic::Popf || insn.mnemonic() == Mnemonic::Popfd || insn.mnemonic() == Mnemonic::Popfq {
            store(memory, at, random.operand() & !(rflags::TF | rflags::AC));
        } else if is_x87(insn) {
            let value = float80(random);
            for (n, word) in value.chunks(8).enumerate() {
                let mut bytes = [0; 8];
                bytes[..word.len()].copy_from_slice(word);
                store(memory, at.wrapping_add(8 * n as u64), u64::from_le_bytes(bytes));
            }
            if random.below(2) == 0 {
                store(memory, at, lanes(random));
            }
        } else {
            for n in 0..4 {
                store(memory, at.wrapping_add(8 * n), lanes(random));
            }
        }
    }
}

fn is_x87(insn: &Instruction) -> bool {
    super::forms::family(insn.code()) == "x87"
}

fn store(memory: &mut [u8], at: u64, value: u64) {
    if let Some(place) = usize::try_from(at).ok().and_then(|at| memory.get_mut(at..at.checked_add(8)?)) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

fn set_register(register: Register, image: &mut Image, random: &mut Random) {
    if register.is_gpr() {
        image.gpr[register.full_register().number()] = random.operand();
    } else if register.is_xmm() || register.is_ymm() {
        let n = register.number();
        for half in [&mut image.area.xmm[n], &mut image.area.ymm_high[n]] {
            half[..8].copy_from_slice(&lanes(random).to_le_bytes());
            half[8..].copy_from_slice(&lanes(random).to_le_bytes());
        }
    } else if register.is_mm() {
        let n = (register.number() + 8 - usize::from(image.area.fsw >> 11 & 7)) % 8;
        image.area.st[n][..8].copy_from_slice(&random.operand().to_le_bytes());
    } else if register.is_st() {
        image.area.st[register.number()][..10].copy_from_slice(&float80(random));
    }
}

/// MXCSR for vector instructions; control, status and tag words for x87 ones.
fn control_words(insn: &Instruction, image: &mut Image, random: &mut Random) {
    let bits = random.next();
    let area = &mut image.area;
    if is_x87(insn) {
        let masks = if random.below(3) == 0 { bits as u16 & 0x3f } else { 0x3f };
        area.fcw = masks | 0x40 | [0, 0x200, 0x300][random.below(3) as usize] | (bits >> 16) as u16 & 0xc00;
        area.fsw = (bits >> 32) as u16 & 0x3800;
        if random.below(16) == 0 {
            let pending = (bits >> 48) as u16 & 0x3f;
            area.fsw |= pending | if pending & !masks & 0x3f != 0 { 0x8080 } else { 0 };
        }
        area.ftw = if random.below(4) == 0 { bits as u16 >> 8 } else { 0xff };
        if random.below(4) == 0 {
            area.st[0][..10].copy_from_slice(&float80(random));
            area.st[1][..10].copy_from_slice(&float80(random));
        }
    } else {
        (area.fcw, area.fsw, area.ftw) = (0x37f, 0, if random.below(8) == 0 { bits as u16 & 0xff } else { 0 });
        let masks = if random.below(8) == 0 { bits as u32 & 0x1f80 } else { 0x1f80 };
        area.mxcsr = masks | (bits >> 32) as u32 & 0xe07f & if random.below(2) == 0 { 0xffff } else { 0x603f };
        // Flags that are set cannot be seen to be set; most states start without.
        if random.below(4) != 0 {
            area.mxcsr &= !0x3f;
        }
    }
}

/// Operands that would make nearly every case fault or take long get smaller.
fn limits(insn: &Instruction, image: &mut Image, random: &mut Random) {
    use Mnemonic::*;
    if (insn.has_rep_prefix() || insn.has_repne_prefix()) && random.below(64) != 0 {
        image.gpr[1] = random.below(24);
    }
    match insn.mnemonic() {
        Bt | Bts | Btr | Btc if insn.op0_kind() == OpKind::Memory && insn.op1_kind() == OpKind::Register => {
            let bits = random.below(8 * 600) as i64 - 8 * 60;
            image.gpr[insn.op1_register().full_register().number()] = bits as u64;
        }
        Div | Idiv if random.below(8) != 0 => {
            let small = random.operand() >> random.below(64);
            image.gpr[2] = if random.below(2) == 0 { small & 0xff } else { (small as i64 >> 63) as u64 };
            if random.below(2) == 0 {
                image.gpr[0] &= 0x7fff;
            }
        }
        Xlatb => image.gpr[0] = random.next(),
        _ => {}
    }
}

/// Sets the registers of memory operands so that their addresses are those of [`Places::operand`]; returns where these are in memory.
fn point(info: &InstructionInfo, insn: &Instruction, places: &Places, image: &mut Image, random: &mut Random) -> Vec<u64> {
    let mut targets = Vec::new();
    for used in info.used_memory() {
        let start = places.base(used.segment());
        let target = places.operand(random).wrapping_sub(places.data).wrapping_add(start);
        let (base, index) = (used.base(), used.index());
        if index.is_vector_register() {
            let lanes = |random: &mut Random| (random.below(512) as u32) as i32 as u32;
            let narrow = used.vsib_size() == 4;
            let n = index.number();
            for half in [&mut image.area.xmm[n], &mut image.area.ymm_high[n]] {
                for lane in half.chunks_mut(if narrow { 4 } else { 8 }) {
                    lane.copy_from_slice(&u64::from(lanes(random)).to_le_bytes()[..lane.len()]);
                }
            }
            if base.is_gpr() {
                image.gpr[base.full_register().number()] = target.wrapping_sub(used.displacement());
            }
            continue;
        }
        let scale = u64::from(used.scale());
        match (base.is_gpr(), index.is_gpr()) {
            (true, true) if base.full_register() == index.full_register() => {
                image.gpr[base.full_register().number()] = target.wrapping_sub(used.displacement()) / (1 + scale);
            }
            (true, true) => {
                let offset = image.gpr[index.full_register().number()].wrapping_mul(scale);
                image.gpr[base.full_register().number()] = target.wrapping_sub(used.displacement()).wrapping_sub(offset);
            }
            (true, false) => image.gpr[base.full_register().number()] = target.wrapping_sub(used.displacement()),
            (false, true) => image.gpr[index.full_register().number()] = target.wrapping_sub(used.displacement()) / scale,
            (false, false) => {}
        }
        let address_32 = base.is_gpr32() || index.is_gpr32();
        if address_32 && base.is_gpr32() {
            image.gpr[base.full_register().number()] |= random.next() << 32;
        }
        let address = if base.is_gpr() || index.is_gpr() { target } else { insn.memory_displacement64() };
        targets.push(address.wrapping_sub(start));
    }
    targets
}

/// The stack pointer: what the instruction asks for, or an aligned place of plain memory.
fn stack_pointer(wanted: u64, places: &Places, random: &mut Random) -> u64 {
    let aligned = wanted & 7 == 0;
    if random.below(16) == 0 || aligned && wanted.wrapping_sub(places.stack) < DATA_SIZE as u64 {
        return wanted;
    }
    places.stack + 1024 + (random.below(4096) & !7)
}

//! Bytes of an instruction of a given form: every addressing mode, random registers, immediates and prefixes.

use iced_x86::{
    Code, ConstantOffsets, Decoder, DecoderOptions, EncodingKind, Instruction, MandatoryPrefix, OpCodeInfo, OpCodeTableKind, OpKind,
};

use super::common::Random;

const ATTEMPTS: usize = 60;
const OPERAND_SIZE: u8 = 0x66;
const ADDRESS_SIZE: u8 = 0x67;
const LOCK: u8 = 0xf0;
const REPNE: u8 = 0xf2;
const REP: u8 = 0xf3;
const REX: u8 = 0x40;
const REX_W: u8 = 8;
const GS: u8 = 0x65;

/// An instruction and where its displacement and immediate are.
#[derive(Clone)]
pub struct Encoded {
    pub bytes: Vec<u8>,
    pub insn: Instruction,
    pub offsets: ConstantOffsets,
}

/// An instruction of form `code` at `ip` in code of `bits`; `None` when no attempt made one.
pub fn encode(code: Code, bits: u32, ip: u64, random: &mut Random) -> Option<Encoded> {
    let form = code.op_code();
    (0..ATTEMPTS).find_map(|_| {
        let bytes = match form.encoding() {
            EncodingKind::Legacy => legacy(form, bits, random),
            EncodingKind::VEX => vex(form, bits, random),
            _ => return None,
        };
        let encoded = decode(bytes, bits, ip)?;
        (encoded.insn.code() == code).then_some(encoded)
    })
}

/// The instruction at the start of `bytes`.
pub fn decode(mut bytes: Vec<u8>, bits: u32, ip: u64) -> Option<Encoded> {
    bytes.truncate(15);
    let mut decoder = Decoder::with_ip(bits, &bytes, ip, DecoderOptions::NO_INVALID_CHECK);
    let insn = decoder.decode();
    if insn.is_invalid() {
        return None;
    }
    let offsets = decoder.get_constant_offsets(&insn);
    bytes.truncate(insn.len());
    Some(Encoded { bytes, insn, offsets })
}

fn chance(random: &mut Random, one_in: u64) -> bool {
    random.below(one_in) == 0
}

/// Whether any operand is of one of the kinds.
fn any(form: &OpCodeInfo, wanted: impl Fn(&str) -> bool) -> bool {
    form.op_kinds().iter().any(|kind| wanted(&format!("{kind:?}")))
}

fn has_modrm(form: &OpCodeInfo) -> bool {
    form.group_index() >= 0
        || form.rm_group_index() >= 0
        || any(form, |kind| {
            ["_reg", "_rm", "_or_mem", "_reg_mem"].iter().any(|end| kind.ends_with(end)) || kind.starts_with("mem") && kind != "mem_offs"
        })
}

/// Whether the ModRM byte names memory; `None` when it may name either.
fn memory_operand(form: &OpCodeInfo) -> Option<bool> {
    let memory = any(form, |kind| kind.starts_with("mem") && kind != "mem_offs");
    let either = any(form, |kind| kind.ends_with("_or_mem"));
    if memory {
        Some(true)
    } else if either {
        None
    } else {
        Some(false)
    }
}

fn modrm(form: &OpCodeInfo, random: &mut Random) -> u8 {
    let mut byte = random.next() as u8;
    if let Ok(group) = u8::try_from(form.group_index()) {
        byte = byte & !0x38 | group << 3;
    }
    let memory = memory_operand(form).unwrap_or_else(|| chance(random, 2));
    if !memory {
        byte |= 0xc0;
    } else if byte >= 0xc0 {
        byte &= 0x3f | (random.below(3) as u8) << 6;
    }
    if let Ok(group) = u8::try_from(form.rm_group_index()) {
        byte = byte & !7 | group;
    }
    byte
}

/// SIB, displacement and immediate: as many as the decoder wants of them.
fn tail(bytes: &mut Vec<u8>, random: &mut Random) {
    let value = if chance(random, 2) { random.operand() } else { random.next() };
    bytes.extend(random.next().to_le_bytes().iter().take(1 + random.below(5) as usize));
    bytes.extend(value.to_le_bytes());
    bytes.extend(random.operand().to_le_bytes());
}

fn legacy(form: &OpCodeInfo, bits: u32, random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(40);
    let memory = memory_operand(form) != Some(false);
    if form.can_use_lock_prefix() && memory && chance(random, 4) || chance(random, 200) {
        bytes.push(LOCK);
    }
    if chance(random, 24) {
        // Outside of 64-bit mode GS is not usable in a process, so every case would fault, and CS is where the ways back differ.
        let choices = if bits == 64 { 5 } else { 3 };
        bytes.push([0x26, 0x36, 0x3e, 0x2e, GS][random.below(choices) as usize]);
    }
    let other_address_size = if bits == 32 { 16 } else { 32 };
    if form.address_size() == other_address_size || memory && chance(random, 16) {
        bytes.push(ADDRESS_SIZE);
    }
    let other_operand_size = if bits == 16 { 32 } else { 16 };
    if form.operand_size() == other_operand_size || chance(random, 64) {
        bytes.push(OPERAND_SIZE);
    }
    match form.mandatory_prefix() {
        MandatoryPrefix::P66 => bytes.push(OPERAND_SIZE),
        MandatoryPrefix::PF3 => bytes.push(REP),
        MandatoryPrefix::PF2 => bytes.push(REPNE),
        _ if form.can_use_rep_prefix() && chance(random, 2) => bytes.push(REP),
        _ if form.can_use_repne_prefix() && chance(random, 3) => bytes.push(REPNE),
        _ => {}
    }
    let rex = random.next() as u8 & 7;
    let wide =
        form.w() == 1 || form.operand_size() == 64 && form.default_op_size64() && chance(random, 4) || form.is_wig() && chance(random, 4);
    if bits != 64 {
        // No REX prefixes.
    } else if wide || form.operand_size() == 64 && !form.default_op_size64() {
        bytes.push(REX | REX_W | rex);
    } else if chance(random, 2) {
        bytes.push(REX | rex);
    }
    opcode(&mut bytes, form, random);
    if has_modrm(form) && form.op_code_len() == 1 {
        bytes.push(modrm(form, random));
    }
    tail(&mut bytes, random);
    bytes
}

fn opcode(bytes: &mut Vec<u8>, form: &OpCodeInfo, random: &mut Random) {
    match form.table() {
        OpCodeTableKind::T0F => bytes.push(0x0f),
        OpCodeTableKind::T0F38 => bytes.extend([0x0f, 0x38]),
        OpCodeTableKind::T0F3A => bytes.extend([0x0f, 0x3a]),
        _ => {}
    }
    let number = if any(form, |kind| kind.ends_with("_opcode")) { random.below(8) as u32 } else { 0 };
    let value = form.op_code() + number;
    if form.op_code_len() == 2 {
        bytes.push((value >> 8) as u8);
    }
    bytes.push(value as u8);
}

fn vex(form: &OpCodeInfo, bits: u32, random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(40);
    if memory_operand(form) != Some(false) && chance(random, 16) {
        bytes.push(ADDRESS_SIZE);
    }
    let map = match form.table() {
        OpCodeTableKind::T0F => 1u8,
        OpCodeTableKind::T0F38 => 2,
        _ => 3,
    };
    let prefix = match form.mandatory_prefix() {
        MandatoryPrefix::P66 => 1u8,
        MandatoryPrefix::PF3 => 2,
        MandatoryPrefix::PF2 => 3,
        _ => 0,
    };
    let vvvv = if any(form, |kind| kind.ends_with("_vvvv")) { random.next() as u8 & 15 } else { 15 };
    // Outside of 64-bit mode these bits are part of LES and LDS where they are clear.
    let (vvvv, extension) = if bits == 64 { (vvvv, random.next() as u8 & 0xe0) } else { (vvvv | 8, 0xe0) };
    let long = if form.is_lig() { chance(random, 2) } else { form.l() != 0 };
    let wide = if form.is_wig() { chance(random, 2) } else { form.w() == 1 };
    let last = vvvv << 3 | u8::from(long) << 2 | prefix;
    if map == 1 && !wide && chance(random, 2) {
        bytes.extend([0xc5, extension & 0x80 | last]);
    } else {
        bytes.extend([0xc4, extension | map, u8::from(wide) << 7 | last]);
    }
    bytes.push(form.op_code() as u8);
    if has_modrm(form) {
        bytes.push(modrm(form, random));
    }
    tail(&mut bytes, random);
    bytes
}

impl Encoded {
    /// The bytes before the opcode that are legacy prefixes.
    pub fn prefixes(&self) -> &[u8] {
        const LEGACY: [u8; 11] = [0x26, 0x2e, 0x36, 0x3e, 0x64, GS, OPERAND_SIZE, ADDRESS_SIZE, LOCK, REPNE, REP];
        let count = self.bytes.iter().take_while(|byte| LEGACY.contains(byte)).count();
        &self.bytes[..count]
    }

    /// Replaces the displacement.
    pub fn patch_displacement(&mut self, value: u64) {
        let (at, size) = (self.offsets.displacement_offset(), self.offsets.displacement_size());
        self.bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
    }

    /// Makes a near branch go to `target`.
    pub fn patch_branch(&mut self, target: u64) {
        let (at, size) = (self.offsets.immediate_offset(), self.offsets.immediate_size());
        let distance = target.wrapping_sub(self.insn.next_ip());
        self.bytes[at..at + size].copy_from_slice(&distance.to_le_bytes()[..size]);
    }

    /// Bytes of the relative branch distance; `None` for other instructions.
    pub fn branch_width(&self) -> Option<usize> {
        let near = matches!(self.insn.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
        near.then(|| self.offsets.immediate_size())
    }
}

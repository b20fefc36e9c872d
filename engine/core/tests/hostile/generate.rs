//! Guests from a seed: mostly valid in what they are not about, so that what they are about is reached.

use softkvm_engine::memory::region::Region;
use softkvm_engine::pmu::log::Filter;
use softkvm_engine::state::{cr0, cr4, efer, rights, seg, Segment, State};
use softkvm_engine::virt::control::{Block, Control};
use softkvm_engine::virt::entry::Core;

use super::common::Random;
use super::RAM;

/// Where things are in the guest's RAM.
pub const CODE: u64 = 0x10_0000;
pub const CODE_SIZE: u64 = 0x4000;
const TABLES: u64 = 0x8_0000;
const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const STACK: u64 = 0x7_0000;

fn chance(random: &mut Random, one_in: u64) -> bool {
    random.below(one_in) == 0
}

fn write(ram: &Region, at: u64, bytes: &[u8]) {
    assert!(at as usize + bytes.len() <= RAM);
    // SAFETY: inside the region.
    unsafe { ram.start().add(at as usize).copy_from(bytes.as_ptr(), bytes.len()) };
}

fn write_u64(ram: &Region, at: u64, value: u64) {
    write(ram, at, &value.to_le_bytes());
}

/// RAM without structure: opcodes that exist are dense among small bytes, addresses that hit RAM are small numbers.
pub fn noise(ram: &Region, random: &mut Random) {
    for at in (0..RAM as u64).step_by(8) {
        let word = match random.below(4) {
            0 => random.next(),
            1 => random.below(RAM as u64),
            2 => random.next() & 0x0f0f_0f0f_0f0f_0f0f,
            _ => random.below(RAM as u64 >> 12) << 12 | 0x27,
        };
        write_u64(ram, at, word);
    }
}

/// One instruction as a fuzzer writes it: prefixes, an opcode of any map, and operands that often point into RAM.
fn instruction(random: &mut Random) -> Vec<u8> {
    const PREFIXES: [u8; 11] = [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf0, 0xf2, 0xf3];
    let mut code = Vec::new();
    while chance(random, 3) && code.len() < 5 {
        code.push(PREFIXES[random.below(PREFIXES.len() as u64) as usize]);
    }
    if chance(random, 8) {
        code.extend([0xc4, random.next() as u8 & 0xe0 | (1 + random.below(3) as u8), random.next() as u8]);
    } else if chance(random, 2) {
        code.push(0x40 | random.next() as u8 & 15);
    }
    match random.below(5) {
        0 | 1 => {}
        2 | 3 => code.push(0x0f),
        _ => code.extend([0x0f, if chance(random, 2) { 0x38 } else { 0x3a }]),
    }
    code.extend([random.next() as u8, random.next() as u8]);
    let operand = if chance(random, 2) { random.below(RAM as u64) } else { random.operand() };
    code.extend(&operand.to_le_bytes()[..random.below(9) as usize]);
    code
}

/// Instructions that load segments, transfer control far, or cause events: what descriptors are for.
fn segment_instruction(random: &mut Random) -> Vec<u8> {
    let selector = (random.below(40) * 8 + random.below(8)) as u8;
    let set_eax = [0xb8, selector, random.below(2) as u8, 0, 0];
    let register = random.below(8) as u8;
    let mut code = set_eax.to_vec();
    match random.below(9) {
        0 => code.extend([0x8e, 0xc0 | register << 3]),
        1 => code.extend([0x0f, 0x00, 0xc0 | register << 3]),
        2 => code.extend([0x0f, [0x02, 0x03, 0xb2, 0xb4, 0xb5][random.below(5) as usize], 0xd8]),
        3 => code.extend([0xcd, random.next() as u8]),
        4 => code.extend([0x50, 0x68, 0, 0, 0x10, 0, 0xcb]),
        5 => code.extend([[0x48, 0xcf], [0x66, 0xcf], [0x48, 0xcb]][random.below(3) as usize]),
        6 => code.extend([0xff, 0x2c, 0x25, 0, 0, random.below(16) as u8, 0]),
        7 => code.extend([0xff, 0x1c, 0x25, 0, 0, random.below(16) as u8, 0]),
        _ => code.extend([0x0f, 0x01, [0x14, 0x1c][random.below(2) as usize], 0x25, 0, 0, random.below(16) as u8, 0]),
    }
    code
}

/// Accesses all over the address space, and what makes the CPU forget translations.
fn memory_instruction(random: &mut Random) -> Vec<u8> {
    let mut code = vec![0x48, 0xb8];
    let address = if chance(random, 4) { random.next() } else { random.next() & 0x0000_00ff_c060_3fff };
    code.extend(address.to_le_bytes());
    code.extend_from_slice(match random.below(9) {
        0 | 1 => &[0x48, 0x8b, 0x18],
        2 | 3 => &[0x48, 0x89, 0x18],
        4 => &[0xf0, 0x48, 0x0f, 0xc1, 0x18],
        5 => &[0x0f, 0x01, 0x38],
        6 => &[0x0f, 0x20, 0xdb, 0x0f, 0x22, 0xdb],
        7 => &[0x48, 0x89, 0xc7, 0xb9, 0x40, 0, 0, 0, 0xf3, 0x48, 0xab],
        _ => &[0xff, 0xd0],
    });
    code
}

fn fill_code(ram: &Region, random: &mut Random, make: fn(&mut Random) -> Vec<u8>) {
    let mut code = Vec::new();
    while code.len() < CODE_SIZE as usize {
        code.extend(make(random));
    }
    write(ram, CODE, &code[..CODE_SIZE as usize]);
}

/// Random code in a sane long-mode guest.
pub fn instructions(ram: &Region, random: &mut Random) -> State {
    fill_code(ram, random, instruction);
    long_mode(ram, random)
}

/// Random descriptors of every type in GDT, LDT and IDT, and a random TSS.
pub fn descriptors(ram: &Region, random: &mut Random) -> State {
    let state = long_mode(ram, random);
    for at in (8..0x2000).step_by(8) {
        if chance(random, 3) {
            continue;
        }
        let access = random.next() as u8 | if chance(random, 4) { 0 } else { 0x80 };
        let target = if chance(random, 2) { CODE + random.below(CODE_SIZE) } else { random.next() };
        let selector = random.below(40) * 8 + random.below(4);
        let gate = target & 0xffff | selector << 16 | (random.next() & 7) << 32 | u64::from(access) << 40 | (target >> 16 & 0xffff) << 48;
        let segment = random.next() & 0x00ff_00ff_ffff_ffff | u64::from(access) << 40;
        write_u64(ram, GDT + at, if chance(random, 2) { gate } else { segment });
    }
    for at in (0..0x80).step_by(8) {
        write_u64(ram, TSS + at, if chance(random, 2) { STACK } else { random.next() });
    }
    fill_code(ram, random, segment_instruction);
    state
}

/// Page tables that point at each other, at themselves, at RAM and at nothing, with any flags.
pub fn page_tables(ram: &Region, random: &mut Random) -> State {
    let state = long_mode(ram, random);
    for at in (TABLES + 8..TABLES + 0x8000).step_by(8) {
        if !chance(random, 3) {
            let target = if chance(random, 2) { TABLES + random.below(8) * 0x1000 } else { random.below(RAM as u64 >> 12) << 12 };
            let flags = random.next() & 0x8000_0000_0000_0fff | if chance(random, 8) { 0 } else { 1 };
            let reserved = if chance(random, 16) { random.next() & 0x7fff_f000_0000_0000 } else { 0 };
            write_u64(ram, at, target | flags | reserved);
        }
    }
    fill_code(ram, random, memory_instruction);
    state
}

/// A long-mode guest at CPL 0 or 3 whose first 2 MB are mapped, with tables in their places.
fn long_mode(ram: &Region, random: &mut Random) -> State {
    for level in 0..3 {
        write_u64(ram, TABLES + level * 0x1000, (TABLES + (level + 1) * 0x1000) | 7);
    }
    for page in 0..512 {
        write_u64(ram, TABLES + 0x3000 + page * 8, page << 12 | 7);
    }
    let mut state = State::default();
    let data = rights::PRESENT | rights::S | rights::RW | rights::ACCESSED | rights::GRANULARITY | rights::DB;
    let dpl = if chance(random, 3) { 3 << rights::DPL_SHIFT } else { 0 };
    for number in 0..6 {
        state.segments[number] = Segment::new(16, data | dpl, u32::MAX, 0);
    }
    let code = data & !rights::DB | rights::CODE | rights::LONG | dpl;
    state.segments[seg::CS] = Segment::new(8, code, u32::MAX, 0);
    state.segments[seg::TR] = Segment::new(24, rights::PRESENT | 11, 0x67, TSS);
    state.segments[seg::LDTR] = Segment::new(32, rights::PRESENT | 2, 0xff, GDT + 0x100);
    (state.gdtr.base, state.gdtr.limit) = (GDT, 0x13f);
    (state.idtr.base, state.idtr.limit) = (IDT, 0xfff);
    state.cr0 = cr0::ET | cr0::PE | cr0::PG | cr0::NE | random.next() & (cr0::WP | cr0::TS | cr0::EM | cr0::AM);
    let optional = cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::UMIP | cr4::SMEP | cr4::SMAP | cr4::FSGSBASE | cr4::OSXSAVE;
    state.cr4 = cr4::PAE | random.next() & optional;
    state.cr3 = TABLES;
    state.efer = efer::LME | efer::LMA | efer::SCE | random.next() & efer::NXE;
    state.rip = CODE;
    state.rflags = 2 | random.next() & 0x0024_0fd5;
    for register in &mut state.gpr {
        *register = if chance(random, 2) { random.below(RAM as u64) } else { random.operand() };
    }
    state.gpr[4] = STACK;
    state.xcr0 = 7;
    (state.fpu.mxcsr, state.fpu.fcw) = (0x1f80, 0x37f);
    state
}

/// Overwrites some words of control and state with anything.
pub fn spoil(block: &mut Block, random: &mut Random) {
    for _ in 0..1 + random.below(4) {
        let value = if chance(random, 2) { random.operand() } else { random.next() };
        if chance(random, 2) {
            // SAFETY: plain integers, for which every bit pattern is valid; the word lies inside.
            unsafe { (&raw mut block.state).cast::<u64>().add(random.below(size_of::<State>() as u64 / 8) as usize).write(value) };
        } else {
            // SAFETY: as above.
            unsafe { (&raw mut block.control).cast::<u64>().add(random.below(size_of::<Control>() as u64 / 8) as usize).write(value) };
        }
    }
}

fn segment(random: &mut Random, access_rights: u32) -> Segment {
    let base = if chance(random, 4) { random.below(RAM as u64) } else { 0 };
    let limit = if chance(random, 4) { random.next() as u32 } else { u32::MAX };
    Segment::new(random.next() as u16, access_rights, limit, base)
}

/// A guest in any mode, in RAM that may hold anything.
pub fn anything(random: &mut Random) -> State {
    let mut state = State::default();
    for register in &mut state.gpr {
        *register = if chance(random, 2) { random.below(RAM as u64) } else { random.next() };
    }
    let flat = rights::PRESENT | rights::S | rights::RW | rights::ACCESSED | rights::GRANULARITY;
    let dpl = if chance(random, 3) { 3 << rights::DPL_SHIFT } else { 0 };
    let mode = random.below(4);
    let width = [0, rights::DB, rights::DB, rights::LONG][mode as usize];
    for number in 0..6 {
        let kind = if number == seg::CS { rights::CODE | width } else { rights::DB };
        state.segments[number] = segment(random, flat | kind | dpl);
    }
    state.segments[seg::TR] = segment(random, rights::PRESENT | 11);
    state.segments[seg::LDTR] = segment(random, rights::PRESENT | 2);
    state.gdtr.limit = 0xffff;
    state.idtr.limit = 0xffff;
    state.gdtr.base = random.below(RAM as u64);
    state.idtr.base = random.below(RAM as u64);
    state.rip = random.below(if mode == 0 { 0x1_0000 } else { RAM as u64 });
    state.rflags = 2 | random.next() & 0x0024_7fd5;
    state.cr0 = cr0::ET | if mode > 0 { cr0::PE } else { 0 } | random.next() & (cr0::TS | cr0::EM | cr0::WP | cr0::NE | cr0::AM);
    state.cr4 = random.next() & (cr4::PSE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::UMIP | cr4::SMEP | cr4::SMAP | cr4::FSGSBASE);
    state.cr3 = random.below(RAM as u64 >> 12) << 12;
    if mode >= 2 {
        state.cr0 |= cr0::PG;
    }
    if mode == 3 {
        state.cr4 |= cr4::PAE;
        state.efer = efer::LME | efer::LMA | efer::SCE | random.next() & efer::NXE;
    }
    state.xcr0 = 3;
    state.fpu.mxcsr = 0x1f80;
    state.fpu.fcw = 0x37f;
    state
}

/// Programs the performance monitoring unit, or lets the guest do it: small indices, registers that exist, counters close to overflow.
pub fn watch(core: &mut Core, block: &mut Block, random: &mut Random) {
    for _ in 0..4 {
        let index = match random.below(4) {
            0 => random.below(0x2000) as u32,
            1 => [0x1d9, 0x1c8, 0x1c9, 0x345, 0x834, 0x49][random.below(6) as usize],
            2 => [0xc1, 0x186, 0x309, 0x38c, 0x4c1][random.below(5) as usize] + random.below(8) as u32,
            _ => 0xc001_0000 + random.below(2) as u32 * 0x200 + random.below(14) as u32,
        };
        let value = match random.below(4) {
            0 => random.next(),
            1 => random.below(64).wrapping_neg() & 0xffff_ffff_ffff,
            2 => 0x53_0000 | random.next() & 0xffff,
            _ => random.next() & 0x7_0000_7fff,
        };
        // A refusal is as good as a change.
        let _refused = core.pmu_write(index, value).is_err() || core.pmu_read(index).is_err();
    }
    block.state.debugctl = random.next() & 0x1803;
    block.control.perf_controls = random.below(4) as u32;
    block.control.guest_perf_global_ctrl = random.next() & 0x7_0000_000f;
    if chance(random, 8) {
        core.branch_log_start(random.below(2000) as usize, Filter { rings: random.next() as u8, low: 0, high: random.next() });
    }
}

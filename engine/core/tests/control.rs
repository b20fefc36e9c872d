//! Segment loads, descriptor instructions, control and debug registers, TLB instructions.

mod common;

use std::sync::Arc;

use common::system::*;
use common::{Machine, CODE};
use softkvm_engine::cpu::CodeSize;
use softkvm_engine::fault::vector;
use softkvm_engine::model::Model;
use softkvm_engine::state::{cr0, cr4, efer, gpr, interruptibility, rflags, rights, seg};
use softkvm_engine::uop::Stop;
use softkvm_engine::virt::control::intercept;

const MOV_DS_AX: [u8; 2] = [0x8e, 0xd8];
const MOV_SS_AX: [u8; 2] = [0x8e, 0xd0];
const MOV_CR0_RAX: [u8; 3] = [0x0f, 0x22, 0xc0];
const MOV_CR3_RAX: [u8; 3] = [0x0f, 0x22, 0xd8];
const MOV_CR4_RAX: [u8; 3] = [0x0f, 0x22, 0xe0];
const MOV_RAX_CR4: [u8; 3] = [0x0f, 0x20, 0xe0];
const HLT: [u8; 1] = [0xf4];

fn long() -> Machine {
    Machine::system(CodeSize::Bits64)
}

fn with_rax(m: &mut Machine, value: u64) {
    m.cpu.set_gpr(gpr::RAX, value);
}

#[test]
fn data_segment_loads_are_checked() {
    let cases = [(ABSENT_DATA, vector::NP), (TASK, vector::GP), (0x1f8, vector::GP), (0xc, vector::GP)];
    for (selector, vector) in cases {
        let mut m = long();
        with_rax(&mut m, selector.into());
        m.expect_fault(&MOV_DS_AX, vector, u32::from(selector) & !3);
        assert_eq!(m.cpu.state.segments[seg::DS].selector, KERNEL_DATA);
    }
    let mut m = long();
    m.enter_user();
    with_rax(&mut m, KERNEL_DATA.into());
    m.expect_fault(&MOV_DS_AX, vector::GP, KERNEL_DATA.into());
}

#[test]
fn a_load_marks_the_descriptor_accessed() {
    let mut m = long();
    with_rax(&mut m, FRESH_DATA.into());
    m.run(&MOV_DS_AX, 1).unwrap();
    assert_eq!(m.descriptor(FRESH_DATA) >> 40 & 0xff, 0x93);
    assert!(m.cpu.state.segments[seg::DS].has(rights::ACCESSED));
}

#[test]
fn null_selectors_are_fine_for_data_and_in_ring_0_for_stacks() {
    let mut m = long();
    with_rax(&mut m, 0);
    m.run(&MOV_DS_AX, 1).unwrap();
    assert!(m.cpu.state.segments[seg::DS].has(rights::UNUSABLE));
    m.run(&MOV_SS_AX, 1).unwrap();
    assert_eq!(m.cpu.cpl(), 0);
    with_rax(&mut m, 3);
    m.expect_fault(&MOV_SS_AX, vector::GP, 0);
    let mut m = Machine::system(CodeSize::Bits32);
    with_rax(&mut m, 0);
    m.expect_fault(&MOV_SS_AX, vector::GP, 0);
}

#[test]
fn stack_segments_must_fit_exactly_and_shadow_interrupts() {
    for (selector, vector) in [(USER_DATA, vector::GP), (ABSENT_DATA, vector::SS), (KERNEL_CODE, vector::GP)] {
        let mut m = long();
        with_rax(&mut m, selector.into());
        m.expect_fault(&MOV_SS_AX, vector, u32::from(selector) & !3);
    }
    let mut m = long();
    with_rax(&mut m, FRESH_DATA.into());
    m.run(&MOV_SS_AX, 1).unwrap();
    assert_eq!(m.cpu.state.interruptibility, interruptibility::MOV_SS);
}

#[test]
fn selectors_are_popped_with_the_width_of_the_operand() {
    let mut m = long();
    m.run(&[0x6a, FRESH_DATA as u8, 0x0f, 0xa1], 2).unwrap();
    assert_eq!((m.cpu.state.segments[seg::FS].selector, m.cpu.gpr(gpr::RSP)), (FRESH_DATA, common::STACK_TOP));
}

#[test]
fn real_mode_loads_keep_the_limit() {
    let mut m = Machine::with_size(CodeSize::Bits16);
    m.cpu.state.segments[seg::DS].limit = u32::MAX;
    with_rax(&mut m, 0x1234);
    m.run(&MOV_DS_AX, 1).unwrap();
    let ds = m.cpu.state.segments[seg::DS];
    assert_eq!((ds.base, ds.limit, m.cpu.segment_base(seg::DS)), (0x1_2340, u32::MAX, 0x1_2340));
}

#[test]
fn far_pointers_load_both_registers() {
    let mut m = Machine::system(CodeSize::Bits32);
    m.poke(0x6000, &[0x78, 0x56, 0x34, 0x12, FRESH_DATA as u8, 0]);
    m.run(&[0xc4, 0x05, 0x00, 0x60, 0x00, 0x00], 1).unwrap();
    assert_eq!((m.cpu.gpr(gpr::RAX), m.cpu.state.segments[seg::ES].selector), (0x1234_5678, FRESH_DATA));
}

#[test]
fn ltr_marks_the_task_busy() {
    let mut m = long();
    with_rax(&mut m, TASK.into());
    m.run(&[0x0f, 0x00, 0xd8], 1).unwrap();
    assert_eq!(m.descriptor(TASK) >> 40 & 0xff, 0x8b);
    assert_eq!((m.cpu.state.segments[seg::TR].base, m.cpu.state.segments[seg::TR].access_rights & 0xf), (TSS, 0xb));
    m.expect_fault(&[0x0f, 0x00, 0xd8], vector::GP, TASK.into());
    with_rax(&mut m, 0);
    m.expect_fault(&[0x0f, 0x00, 0xd8], vector::GP, 0);
}

#[test]
fn lgdt_loads_what_sgdt_stores() {
    let mut m = long();
    m.poke(0x6000, &[0x7f, 0x00, 0x00, 0x10, 0, 0, 0, 0x80, 0xff, 0xff]);
    m.run(&[0x0f, 0x01, 0x14, 0x25, 0x00, 0x60, 0, 0], 1).unwrap();
    assert_eq!((m.cpu.state.gdtr.base, m.cpu.state.gdtr.limit), (0xffff_8000_0000_1000, 0x7f));
    m.run(&[0x0f, 0x01, 0x04, 0x25, 0x10, 0x60, 0, 0], 1).unwrap();
    assert_eq!(m.peek(0x6000, 10), m.peek(0x6010, 10));
    m.poke(0x6008, &[0, 0]);
    m.expect_fault(&[0x0f, 0x01, 0x14, 0x25, 0x00, 0x60, 0, 0], vector::GP, 0);
}

#[test]
fn umip_hides_the_tables() {
    let mut m = long();
    m.enter_user();
    m.run(&[0x0f, 0x01, 0x04, 0x25, 0x10, 0x60, 0, 0], 1).unwrap();
    m.cpu.state.cr4 |= cr4::UMIP;
    for code in [&[0x0f, 0x01, 0x04, 0x25, 0x10, 0x60, 0, 0][..], &[0x0f, 0x00, 0xc0], &[0x0f, 0x00, 0xc8], &[0x0f, 0x01, 0xe0]] {
        m.expect_fault(code, vector::GP, 0);
    }
}

#[test]
fn descriptor_instructions_exit_when_watched() {
    let mut m = long();
    m.cpu.control.intercepts = 1 << intercept::DESCRIPTOR_TABLE;
    assert_eq!(m.run(&[0x0f, 0x01, 0x14, 0x25, 0x00, 0x60, 0, 0], 1), Err(Stop::Exit));
    assert_eq!((m.cpu.exit.reason, m.cpu.exit.qualification, m.cpu.exit.instruction_info), (46, 0x6000, 2 << 28));
    m.cpu.model = Arc::new(Model::new("epyc", &[]).unwrap());
    let codes: [&[u8]; 3] = [&[0x0f, 0x01, 0x14, 0x25, 0x00, 0x60, 0, 0], &[0x0f, 0x01, 0x1c, 0x25, 0x00, 0x60, 0, 0], &[0x0f, 0x00, 0xc8]];
    for (code, reason) in codes.into_iter().zip([0x6b, 0x6a, 0x69]) {
        assert_eq!(m.run(code, 1), Err(Stop::Exit));
        assert_eq!(m.cpu.exit.reason, reason);
    }
}

#[test]
fn lar_lsl_verr_and_verw_tell_what_is_visible() {
    let mut m = long();
    m.cpu.set_gpr(gpr::RCX, KERNEL_CODE.into());
    m.run(&[0x0f, 0x02, 0xc1], 1).unwrap();
    assert_eq!((m.cpu.gpr(gpr::RAX), m.cpu.flags.zf()), (0x00a0_9b00, true));
    m.run(&[0x0f, 0x03, 0xc1], 1).unwrap();
    assert_eq!((m.cpu.gpr(gpr::RAX), m.cpu.flags.zf()), (0xffff_ffff, true));
    m.run(&[0x0f, 0x00, 0xe1], 1).unwrap();
    assert!(m.cpu.flags.zf(), "readable");
    m.run(&[0x0f, 0x00, 0xe9], 1).unwrap();
    assert!(!m.cpu.flags.zf(), "code is not writable");
    m.enter_user();
    m.run(&[0x0f, 0x02, 0xc1], 1).unwrap();
    assert!(!m.cpu.flags.zf(), "ring 3 does not see ring 0");
}

#[test]
fn swapgs_and_the_bases() {
    let mut m = long();
    m.cpu.state.kernel_gs_base = 0xffff_8880_0000_0000;
    m.run(&[0x0f, 0x01, 0xf8], 1).unwrap();
    assert_eq!((m.cpu.segment_base(seg::GS), m.cpu.state.kernel_gs_base), (0xffff_8880_0000_0000, 0));
    assert_eq!((m.run(&[0xf3, 0x48, 0x0f, 0xae, 0xd0], 1), m.vector()), (Err(Stop::Fault), vector::UD), "CR4.FSGSBASE is clear");
    m.cpu.state.cr4 |= cr4::FSGSBASE;
    with_rax(&mut m, 0x1234_5678_9abc);
    m.run(&[0xf3, 0x48, 0x0f, 0xae, 0xd0], 1).unwrap();
    assert_eq!(m.cpu.segment_base(seg::FS), 0x1234_5678_9abc);
    with_rax(&mut m, 1 << 47);
    m.expect_fault(&[0xf3, 0x48, 0x0f, 0xae, 0xd0], vector::GP, 0);
    m.enter_user();
    m.expect_fault(&[0x0f, 0x01, 0xf8], vector::GP, 0);
}

#[test]
fn invalid_control_register_values_are_refused() {
    let long_cr0 = cr0::PE | cr0::PG | cr0::NE;
    let cases = [
        (MOV_CR0_RAX, long_cr0 | 1 << 32),
        (MOV_CR0_RAX, cr0::PG),
        (MOV_CR0_RAX, long_cr0 | cr0::NW),
        (MOV_CR0_RAX, cr0::PE),
        (MOV_CR4_RAX, 0),
        (MOV_CR4_RAX, cr4::PAE | 1 << 15),
        (MOV_CR4_RAX, cr4::PAE | cr4::VMXE),
        (MOV_CR3_RAX, 1 << 46),
        (MOV_CR3_RAX, 1 << 63),
    ];
    for (code, value) in cases {
        let mut m = long();
        let before = (m.cpu.state.cr0, m.cpu.state.cr3, m.cpu.state.cr4);
        with_rax(&mut m, value);
        m.expect_fault(&code, vector::GP, 0);
        assert_eq!((m.cpu.state.cr0, m.cpu.state.cr3, m.cpu.state.cr4), before);
    }
}

#[test]
fn turning_paging_on_enters_and_off_leaves_long_mode() {
    let mut m = long();
    let tables = m.cpu.state.cr3;
    let mut m32 = Machine::system(CodeSize::Bits32);
    m32.cpu.state.efer = efer::LME;
    with_rax(&mut m32, cr0::PE | cr0::PG);
    m32.expect_fault(&MOV_CR0_RAX, vector::GP, 0);
    m32.cpu.state.cr4 |= cr4::PAE;
    m32.poke(tables, &m.peek(tables, 0x8000));
    m32.cpu.state.cr3 = tables;
    m32.run(&MOV_CR0_RAX, 1).unwrap();
    assert_eq!((m32.cpu.state.efer, m32.cpu.code_size), (efer::LME | efer::LMA, CodeSize::Bits32));
    with_rax(&mut m32, cr0::PE);
    m32.run(&MOV_CR0_RAX, 1).unwrap();
    assert_eq!(m32.cpu.state.efer, efer::LME);
    with_rax(&mut m, 0);
    m.expect_fault(&MOV_CR0_RAX, vector::GP, 0);
}

#[test]
fn pae_paging_loads_its_pdptes() {
    let mut m = Machine::system(CodeSize::Bits32);
    m.cpu.state.cr4 |= cr4::PAE;
    m.cpu.state.cr3 = 0x6000;
    m.poke(0x6000, &[0x01, 0x70]);
    with_rax(&mut m, cr0::PE | cr0::PG);
    m.run(&MOV_CR0_RAX, 1).unwrap();
    assert_eq!(m.cpu.state.pdpte, [0x7001, 0, 0, 0]);
    let mut m = Machine::system(CodeSize::Bits32);
    m.cpu.state.cr4 |= cr4::PAE;
    m.cpu.state.cr3 = 0x6000;
    m.poke(0x6008, &[0x03]);
    with_rax(&mut m, cr0::PE | cr0::PG);
    m.expect_fault(&MOV_CR0_RAX, vector::GP, 0);
}

#[test]
fn the_hypervisors_bits_show_its_shadow_and_exit() {
    let mut m = long();
    (m.cpu.control.cr4_mask, m.cpu.control.cr4_shadow) = (cr4::VMXE | cr4::PGE, cr4::PGE);
    m.run(&MOV_RAX_CR4, 1).unwrap();
    let seen = m.cpu.gpr(gpr::RAX);
    assert_eq!(seen, m.cpu.state.cr4 | cr4::PGE);
    with_rax(&mut m, seen | cr4::UMIP);
    m.run(&MOV_CR4_RAX, 1).unwrap();
    assert_eq!(m.cpu.state.cr4, seen & !cr4::PGE | cr4::UMIP);
    with_rax(&mut m, seen | cr4::VMXE);
    assert_eq!(m.run(&MOV_CR4_RAX, 1), Err(Stop::Exit));
    assert_eq!((m.cpu.exit.reason, m.cpu.exit.qualification), (28, 4));
}

#[test]
fn control_register_exits_name_the_register() {
    let mut m = long();
    m.cpu.control.cr_read = 1 << 3;
    m.cpu.control.cr_write = 1 << 8;
    assert_eq!(m.run(&[0x0f, 0x20, 0xdf], 1), Err(Stop::Exit));
    assert_eq!((m.cpu.exit.reason, m.cpu.exit.qualification), (28, 3 | 1 << 4 | 7 << 8));
    m.cpu.model = Arc::new(Model::new("epyc", &[]).unwrap());
    assert_eq!(m.run(&[0x44, 0x0f, 0x22, 0xc2], 1), Err(Stop::Exit));
    assert_eq!((m.cpu.exit.reason, m.cpu.exit.qualification), (0x18, 1 << 63 | 2));
}

#[test]
fn lmsw_and_clts() {
    let mut m = long();
    with_rax(&mut m, 8);
    m.run(&[0x0f, 0x01, 0xf0], 1).unwrap();
    assert_eq!(m.cpu.state.cr0 & 0xf, cr0::TS | cr0::PE, "PE stays");
    m.run(&[0x0f, 0x06], 1).unwrap();
    assert_eq!(m.cpu.state.cr0 & cr0::TS, 0);
    (m.cpu.control.cr0_mask, m.cpu.control.cr0_shadow) = (cr0::TS, cr0::TS);
    assert_eq!(m.run(&[0x0f, 0x06], 1), Err(Stop::Exit));
    assert_eq!(m.cpu.exit.qualification, 2 << 4);
}

#[test]
fn a_switch_of_address_space_drops_translations_unless_told_not_to() {
    let load = [0x48, 0x8b, 0x1c, 0x25, 0x00, 0x00, 0x10, 0x00];
    for (keep, expected) in [(0, 2), (1u64 << 63, 1)] {
        let mut m = long();
        m.map(0x10_0000, 0x11_0000);
        (0..2).for_each(|n| m.poke(0x11_0000 + 0x1000 * n, &[n as u8 + 1]));
        m.enter_user();
        m.cpu.state.cr4 |= cr4::PCIDE;
        m.cpu.refresh();
        m.run(&load, 1).unwrap();
        m.map(0x10_0000, 0x11_1000);
        m.cpu.state.segments[seg::SS].access_rights &= !0x60;
        m.cpu.refresh();
        let tables = m.cpu.state.cr3;
        for value in [tables | 1, tables | keep] {
            with_rax(&mut m, value);
            m.run(&MOV_CR3_RAX, 1).unwrap();
        }
        assert_eq!(m.cpu.state.cr3, tables);
        m.enter_user();
        m.run(&load, 1).unwrap();
        assert_eq!(m.cpu.gpr(gpr::RBX), expected);
    }
}

#[test]
fn invlpg_drops_one_translation() {
    let mut m = long();
    m.poke(0x11_0000, &[7]);
    m.run(&[0x48, 0x8b, 0x1c, 0x25, 0x00, 0x00, 0x10, 0x00], 1).unwrap();
    m.map(0x10_0000, 0x11_0000);
    m.run(&[0x0f, 0x01, 0x3c, 0x25, 0x10, 0x00, 0x10, 0x00], 1).unwrap();
    m.run(&[0x48, 0x8b, 0x1c, 0x25, 0x00, 0x00, 0x10, 0x00], 1).unwrap();
    assert_eq!(m.cpu.gpr(gpr::RBX), 7);
    m.cpu.control.intercepts = 1 << intercept::INVLPG;
    assert_eq!(m.run(&[0x0f, 0x01, 0x3c, 0x25, 0x10, 0x00, 0x10, 0x00], 1), Err(Stop::Exit));
    assert_eq!((m.cpu.exit.reason, m.cpu.exit.qualification), (14, 0x10_0010));
}

#[test]
fn invpcid_checks_its_descriptor() {
    const INVPCID: [u8; 9] = [0x66, 0x0f, 0x38, 0x82, 0x04, 0x25, 0x00, 0x60, 0x00];
    let code: Vec<u8> = INVPCID.iter().copied().chain([0]).collect();
    for (kind, pcid, address, works) in
        [(0, 0, 0x1000, true), (0, 0, 1 << 47, false), (1, 5, 0, false), (2, 0, 1 << 47, true), (4, 0, 0, false), (3, 1 << 12, 0, false)]
    {
        let mut m = long();
        m.poke(0x6000, &u64::to_le_bytes(pcid));
        m.poke(0x6008, &u64::to_le_bytes(address));
        with_rax(&mut m, kind);
        assert_eq!(m.run(&code, 1).is_ok(), works, "type {kind}");
    }
}

#[test]
fn debug_registers_keep_their_fixed_bits() {
    let mut m = long();
    with_rax(&mut m, 0);
    m.run(&[0x0f, 0x23, 0xf0, 0x0f, 0x23, 0xf8], 2).unwrap();
    assert_eq!((m.cpu.state.dr6, m.cpu.state.dr7), (0xffff_0ff0, 0x400));
    m.run(&[0x0f, 0x21, 0xe0], 1).unwrap();
    assert_eq!(m.cpu.gpr(gpr::RAX), 0xffff_0ff0, "DR4 is DR6");
    m.cpu.state.cr4 |= cr4::DE;
    assert_eq!((m.run(&[0x0f, 0x21, 0xe0], 1), m.vector()), (Err(Stop::Fault), vector::UD));
    with_rax(&mut m, 1 << 32);
    m.expect_fault(&[0x0f, 0x23, 0xf8], vector::GP, 0);
    m.cpu.control.dr_write = 1 << 7;
    assert_eq!(m.run(&[0x0f, 0x23, 0xf8], 1), Err(Stop::Exit));
    assert_eq!((m.cpu.exit.reason, m.cpu.exit.qualification), (29, 7));
}

#[test]
fn smap_is_switched_by_stac_and_clac() {
    let mut m = long();
    m.cpu.state.cr4 |= cr4::SMAP;
    m.cpu.refresh();
    m.run(&[0x0f, 0x01, 0xcb], 1).ok();
    assert_eq!((m.run(&[0x48, 0x8b, 0x1c, 0x25, 0, 0, 0x10, 0], 1), m.cpu.rflags() & rflags::AC), (Ok(()), rflags::AC));
    m.run(&[0x0f, 0x01, 0xca], 1).unwrap();
    m.expect_fault(&[0x48, 0x8b, 0x1c, 0x25, 0, 0, 0x10, 0], vector::PF, 1);
}

#[test]
fn halt_exits_or_waits() {
    let mut m = long();
    m.run(&HLT, 1).unwrap();
    assert_eq!((m.cpu.state.activity, m.cpu.rip()), (1, CODE + 1));
    m.cpu.control.intercepts = 1 << intercept::HLT;
    assert_eq!(m.run(&HLT, 1), Err(Stop::Exit));
    assert_eq!((m.cpu.exit.reason, m.cpu.rip()), (12, CODE));
    m.enter_user();
    m.expect_fault(&HLT, vector::GP, 0);
}

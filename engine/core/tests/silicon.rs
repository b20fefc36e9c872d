//! Flags and results that the manuals leave undefined: each model has those of its vendor's silicon, on any host and in every tier.
//!
//! AMD's were read off a Zen 5 (family 26, model 2). Intel's are those that `model/silicon.rs` states.

mod common;

use common::{intercepted, Machine, CODE, DATA};
use softkvm_engine::jit::Tier;
use softkvm_engine::model::Model;
use softkvm_engine::state::{gpr, rflags};

/// What an instruction leaves: EAX, and the flags behind clear and behind set ones.
type Outcome = (u64, [u64; 2]);

/// Instruction, EAX and EBX before, and what Intel's and AMD's silicon make of it. ECX is 2000h.
const CASES: &[(&[u8], u64, u64, Outcome, Outcome)] = &[
    // SHL, SHR, SAR EAX, 5
    (&[0xc1, 0xe0, 5], 0x1234_5678, 0, (0x468a_cf00, [0x04, 0x04]), (0x468a_cf00, [0x14, 0x14])),
    (&[0xc1, 0xe8, 5], 0x9234_5678, 0, (0x0491_a2b3, [0x01, 0x01]), (0x0491_a2b3, [0x11, 0x11])),
    (&[0xc1, 0xf8, 5], 0x9234_5678, 0, (0xfc91_a2b3, [0x81, 0x81]), (0xfc91_a2b3, [0x91, 0x91])),
    // SHLD, SHRD EAX, EBX, 5
    (&[0x0f, 0xa4, 0xd8, 5], 0x1234_5678, 0x9abc_def0, (0x468a_cf13, [0, 0]), (0x468a_cf13, [0x10, 0x10])),
    (&[0x0f, 0xac, 0xd8, 5], 0x1234_5678, 0x9abc_def7, (0xb891_a2b3, [0x881, 0x881]), (0xb891_a2b3, [0x891, 0x891])),
    // SHLD, SHRD AX, BX, 20
    (&[0x66, 0x0f, 0xa4, 0xd8, 20], 0x1234, 0xabcd, (0xbcd1, [0x884, 0x884]), (0xbcda, [0x90, 0x90])),
    (&[0x66, 0x0f, 0xac, 0xd8, 20], 0x1234, 0xabcd, (0x4abc, [0x01, 0x01]), (0xdabc, [0x90, 0x90])),
    // RCL, RCR AL, 9
    (&[0xc0, 0xd0, 9], 0x81, 0, (0x81, [0, 0x8d5]), (0x81, [0x800, 0xd5])),
    (&[0xc0, 0xd8, 9], 0x41, 0, (0x41, [0, 0x8d5]), (0x41, [0x800, 0x8d5])),
    // MUL EBX; IMUL EAX, EBX
    (&[0xf7, 0xe3], 3, 5, (15, [0x04, 0x04]), (15, [0, 0xd4])),
    (&[0x0f, 0xaf, 0xc3], 0x8000_0000, 3, (0x8000_0000, [0x885, 0x885]), (0x8000_0000, [0x801, 0x8d5])),
    // DIV, IDIV EBX
    (&[0xf7, 0xf3], 100, 7, (14, [0, 0x8d5]), (14, [0x10, 0x811])),
    (&[0xf7, 0xfb], 100, 7, (14, [0, 0x8d5]), (14, [0x10, 0x811])),
    // BSF, BSR EAX, EBX, and a BSF that finds nothing
    (&[0x0f, 0xbc, 0xc3], 0, 0x81_0080, (7, [0, 0]), (7, [0, 0])),
    (&[0x0f, 0xbd, 0xc3], 0, 0x4003, (14, [0x04, 0x04]), (14, [0, 0])),
    (&[0x0f, 0xbc, 0xc3], 1, 0, (1, [0x44, 0x44]), (1, [0x44, 0x44])),
    // TZCNT, LZCNT EAX, EBX; BEXTR EAX, EBX, ECX
    (&[0xf3, 0x0f, 0xbc, 0xc3], 0, 0x80, (7, [0, 0]), (7, [0, 0x800])),
    (&[0xf3, 0x0f, 0xbd, 0xc3], 0, 0x80, (0x18, [0x04, 0x04]), (0x18, [0, 0x800])),
    (&[0xc4, 0xe2, 0x70, 0xf7, 0xc3], 0, 0x8000_0000, (0x8000_0000, [0x84, 0x84]), (0x8000_0000, [0x14, 0x14])),
    // FLD1; FLD1; FCHS; FXAM, which sets C1; FCOMI ST, ST(1), or FCMOVB ST, ST(1); FNSTSW AX
    (&[0xd9, 0xe8, 0xd9, 0xe8, 0xd9, 0xe0, 0xd9, 0xe5, 0xdb, 0xf1, 0xdf, 0xe0], 0, 0, (0x3400, [0x01, 0x01]), (0x3600, [0x01, 0x01])),
    (&[0xd9, 0xe8, 0xd9, 0xe8, 0xd9, 0xe0, 0xd9, 0xe5, 0xda, 0xc1, 0xdf, 0xe0], 0, 0, (0x3400, [0, 0x8d5]), (0x3600, [0, 0x8d5])),
];

/// MOV [RSI], RAX, behind which no instruction replaces the flags; then INT3.
const TAIL: [u8; 4] = [0x48, 0x89, 0x06, 0xcc];
const BP: u8 = 3;

fn run(model: &str, tier: Tier, code: &[u8], eax: u64, ebx: u64, flags: u64) -> (u64, u64) {
    let mut machine = Machine::with_model(Model::new(model, &[]).expect("a model"));
    machine.cpu.set_translator(tier.threshold());
    machine.load(&[code, &TAIL].concat());
    machine.set_flags(flags);
    for (register, value) in [(gpr::RAX, eax), (gpr::RBX, ebx), (gpr::RCX, 0x2000), (gpr::RDX, 0), (gpr::RSI, DATA)] {
        machine.cpu.set_gpr(register, value);
    }
    machine.cpu.control.exception_bitmap = u32::MAX;
    machine.cpu.budget = 100;
    machine.cpu.run();
    assert_eq!(intercepted(&machine.cpu).map(|(vector, ..)| vector), Some(BP), "{model} {tier:?} at {:#x}", machine.cpu.rip() - CODE);
    (machine.cpu.gpr(gpr::RAX), machine.cpu.rflags() & rflags::ARITHMETIC)
}

#[test]
fn undefined_flags_are_those_of_the_models_vendor() {
    for (code, eax, ebx, intel, amd) in CASES {
        for (model, (result, flags)) in [("cascadelake", intel), ("epyc", amd)] {
            for tier in [Tier::Interpreter, Tier::Translator] {
                let found = [0, rflags::ARITHMETIC].map(|before| run(model, tier, code, *eax, *ebx, before));
                let wanted = flags.map(|flags| (*result, flags));
                assert_eq!(found, wanted, "{code:02x?} of {model} with {tier:?}: {found:x?} and not {wanted:x?}");
            }
        }
    }
}

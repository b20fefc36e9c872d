//! Pieces of host code that translations are made of: flags between host and guest, TLB checks, the way into the interpreter and back.
//!
//! Guest flags are in the host's flags, in `Native::flags`, in both, or dead. What the interpreter would see at an instruction that may
//! fault, exit or leave the block is in memory there: state is precise at every instruction.

use std::mem::offset_of;

use iced_x86::code_asm::registers::get_gpr64;
use iced_x86::code_asm::*;
use iced_x86::{Code, ConditionCode, IcedError, Instruction, Register};

use super::native::{FLAGS, TARGET, TARGET_RIP, VECTORS};
use super::registers;
use super::vector::Width;
use crate::cpu::Cpu;
use crate::decode::block::{Block, Link};
use crate::decode::cache::Jump;
use crate::paging::tlb;
use crate::paging::AccessKind;
use crate::uop::slot;

pub type Emit<T = ()> = Result<T, IcedError>;

/// Where fixed things are that host code needs.
#[derive(Clone, Copy)]
pub struct Places {
    /// The stub that runs one instruction in the interpreter.
    pub resume: u64,
    /// The stub that does so in a block that works on vector registers.
    pub resume_vectors: u64,
    /// The stubs that bring the vector registers, XMM or YMM, into the host's.
    pub gates: [u64; 2],
    /// The stub that returns to the dispatcher before a block.
    pub boundary: u64,
    /// The core's attention word.
    pub attention: u64,
    /// The jump cache.
    pub jumps: u64,
}

/// How OF follows from an instruction where host processors differ.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Overflow {
    Host,
    Clear,
    /// CF differs from SF: shifts to the left.
    CarryFromSign,
}

/// How the guest's flags come from the host's.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    Exact,
    /// Shifts: AF is clear, and OF as it says.
    Shift(Overflow),
    /// Multiplications: CF and OF are the host's, the others those of the low half of the product.
    Product,
}

/// Code at the end that is rarely run.
struct Cold {
    label: CodeLabel,
    index: usize,
    /// Where to go on, and whether host flags are expected there. Nowhere, if the instruction ends the block.
    back: Option<(CodeLabel, bool)>,
}

/// Host code of one block in the making.
pub struct Emitter {
    pub asm: CodeAssembler,
    places: Places,
    block: u64,
    /// Number of the block's last instruction.
    last: usize,
    /// Vector registers that the block works on.
    vectors: Option<Width>,
    /// Where vector registers are asked for, and where they are there.
    gate: Option<(CodeLabel, CodeLabel)>,
    cold: Vec<Cold>,
    /// The host's flags are the guest's.
    host_flags: bool,
    /// `Native::flags` are the guest's.
    saved_flags: bool,
}

/// The 64-bit register `register`.
pub fn r64(register: Register) -> AsmRegister64 {
    get_gpr64(register).unwrap_or_else(|| unreachable!("{register:?} is not a 64-bit register"))
}

/// TEST of a register with itself.
fn test_with_itself(register: Register) -> Emit<Instruction> {
    let code = match register.size() {
        8 => Code::Test_rm64_r64,
        4 => Code::Test_rm32_r32,
        2 => Code::Test_rm16_r16,
        _ => Code::Test_rm8_r8,
    };
    Instruction::with2(code, register, register)
}

/// A field of the CPU.
pub fn cpu_field(offset: usize) -> AsmMemoryOperand {
    qword_ptr(rbp + offset as i32)
}

/// A 64-bit guest register that stays in memory.
pub fn in_memory(guest: Register) -> AsmMemoryOperand {
    cpu_field(offset_of!(Cpu, regs) + registers::offset(guest))
}

/// RIP of the running block.
pub fn block_rip() -> AsmMemoryOperand {
    cpu_field(offset_of!(Cpu, regs) + slot::RIP as usize * 8)
}

impl Emitter {
    pub fn new(places: Places, block: *const Block, instructions: usize, vectors: Option<Width>) -> Emit<Self> {
        Ok(Emitter {
            asm: CodeAssembler::new(64)?,
            places,
            block: block as u64,
            last: instructions - 1,
            vectors,
            gate: None,
            cold: Vec::new(),
            host_flags: false,
            saved_flags: true,
        })
    }

    /// Sets `label` here; any number of labels may be in one place.
    pub fn set_label(&mut self, label: &mut CodeLabel) -> Emit {
        self.asm.set_label(label)?;
        self.asm.zero_bytes()
    }

    // ---- flags ----------------------------------------------------------------------------------------------------------------------

    /// Keeps the guest's flags in memory, from where the interpreter takes them.
    pub fn save_flags(&mut self) -> Emit {
        if self.host_flags && !self.saved_flags {
            self.store_flags(Overflow::Host, false)?;
        }
        Ok(())
    }

    /// Stores the guest's flags, which are the host's but for OF, and AF where it has to be clear.
    fn store_flags(&mut self, overflow: Overflow, clear_half_carry: bool) -> Emit {
        let a = &mut self.asm;
        a.mov(r13, rax)?;
        a.lahf()?;
        match overflow {
            Overflow::Host => a.seto(al)?,
            Overflow::Clear => a.mov(al, 0)?,
            Overflow::CarryFromSign => {
                a.mov(al, ah)?;
                a.rol(al, 1)?;
                a.xor(al, ah)?;
                a.and(al, 1)?;
            }
        }
        if clear_half_carry {
            a.and(ah, 0xefu32 as i32)?;
        }
        a.mov(word_ptr(rbp + FLAGS as i32), ax)?;
        self.keep_stored_flags(r13)
    }

    /// Stores the flags of a multiplication with the low half `product`.
    fn store_product_flags(&mut self, product: Register) -> Emit {
        let low = if product.full_register() == Register::RAX { registers::resized(Register::R14, product) } else { product };
        let a = &mut self.asm;
        a.mov(r14, rax)?;
        a.seto(al)?;
        a.add_instruction(test_with_itself(low)?)?;
        a.lahf()?;
        a.or(ah, al)?;
        self.keep_stored_flags(r14)
    }

    /// Ends a sequence that has made the flags' stored form in AX: puts it in its place, and RAX back from `rax_copy`.
    fn keep_stored_flags(&mut self, rax_copy: AsmRegister64) -> Emit {
        self.asm.mov(word_ptr(rbp + FLAGS as i32), ax)?;
        self.asm.mov(rax, rax_copy)?;
        self.saved_flags = true;
        Ok(())
    }

    /// Makes the host's flags the guest's.
    pub fn need_flags(&mut self) -> Emit {
        if !self.host_flags {
            self.restore_flags()?;
            self.host_flags = true;
        }
        Ok(())
    }

    fn restore_flags(&mut self) -> Emit {
        let a = &mut self.asm;
        a.mov(r13, rax)?;
        a.movzx(eax, word_ptr(rbp + FLAGS as i32))?;
        a.add(al, 0x7f)?;
        a.sahf()?;
        a.mov(rax, r13)
    }

    /// Host code is about to destroy the host's flags; `live` tells whether the guest's are seen again.
    pub fn clobber_flags(&mut self, live: bool) -> Emit {
        if live {
            self.save_flags()?;
        }
        self.host_flags = false;
        Ok(())
    }

    /// An instruction has left the guest's flags in the host's, as `rule` tells; `result` is its first register.
    pub fn new_flags(&mut self, rule: Rule, result: Register, live: bool) -> Emit {
        self.host_flags = live && rule == Rule::Exact;
        self.saved_flags = false;
        match rule {
            Rule::Shift(overflow) if live => self.store_flags(overflow, true),
            Rule::Product if live => self.store_product_flags(result),
            _ => Ok(()),
        }
    }

    // ---- memory ---------------------------------------------------------------------------------------------------------------------

    /// Turns the linear address in R14 of an access of `bytes` into a host address there, or goes to cold code. Clobbers R13, R15 and the
    /// flags.
    pub fn translate(&mut self, bytes: usize, kind: AccessKind, miss: CodeLabel) -> Emit {
        const SLOT_SHIFT: u32 = 12 - size_of::<tlb::Entry>().trailing_zeros();
        let tag = match kind {
            AccessKind::Read => offset_of!(tlb::Entry, read),
            AccessKind::Write => offset_of!(tlb::Entry, write),
            AccessKind::Fetch => offset_of!(tlb::Entry, fetch),
        };
        let a = &mut self.asm;
        a.mov(r13d, r14d)?;
        a.lea(r15, qword_ptr(r14 + (bytes - 1) as i32))?;
        a.shr(r13d, SLOT_SHIFT)?;
        a.and(r13d, ((tlb::ENTRIES - 1) * size_of::<tlb::Entry>()) as i32)?;
        a.add(r13, cpu_field(offset_of!(Cpu, active_table)))?;
        a.and(r15, -4096)?;
        a.cmp(r15, qword_ptr(r13 + tag as i32))?;
        a.jne(miss)?;
        a.add(r14, qword_ptr(r13 + offset_of!(tlb::Entry, addend) as i32))
    }

    /// Locked accesses that are not aligned need the bus, which the interpreter has.
    pub fn require_alignment(&mut self, bytes: usize, miss: CodeLabel) -> Emit {
        if bytes > 1 {
            self.asm.test(r14b, (bytes - 1) as i32)?;
            self.asm.jne(miss)?;
        }
        Ok(())
    }

    // ---- the interpreter --------------------------------------------------------------------------------------------------------------

    /// Cold code that runs instruction `index` in the interpreter instead. It comes back where [`Emitter::rejoin`] says, if that is called
    /// before the next one.
    pub fn detour(&mut self, index: usize) -> CodeLabel {
        let label = self.asm.create_label();
        self.cold.push(Cold { label, index, back: None });
        label
    }

    /// The last detour comes back here.
    pub fn rejoin(&mut self) -> Emit {
        let mut back = self.asm.create_label();
        self.set_label(&mut back)?;
        let host_flags = self.host_flags;
        if let Some(cold) = self.cold.last_mut() {
            cold.back = Some((back, host_flags));
        }
        Ok(())
    }

    /// Runs instruction `index` in the interpreter.
    pub fn interpret(&mut self, index: usize) -> Emit {
        self.save_flags()?;
        self.call_resume(index)?;
        (self.host_flags, self.saved_flags) = (false, true);
        Ok(())
    }

    fn call_resume(&mut self, index: usize) -> Emit {
        let a = &mut self.asm;
        a.mov(r13d, index as u32)?;
        a.mov(r14, self.block)?;
        // Behind the last instruction nobody needs them, and it may have changed who may use them.
        a.call(if self.vectors.is_some() && index < self.last { self.places.resume_vectors } else { self.places.resume })
    }

    // ---- ways between blocks ------------------------------------------------------------------------------------------------------------

    /// What another block's jump meets before this block's first instruction: work of the dispatcher, and what the block costs.
    pub fn prologue(&mut self, instructions: u32) -> Emit {
        let a = &mut self.asm;
        a.mov(r13, self.places.attention)?;
        a.mov(r13d, dword_ptr(r13))?;
        a.or(r13d, dword_ptr(rbp + offset_of!(Cpu, pending) as i32))?;
        a.jne(self.places.boundary)?;
        let budget = cpu_field(offset_of!(Cpu, budget));
        a.cmp(budget, 0)?;
        a.jle(self.places.boundary)?;
        a.sub(budget, instructions as i32)?;
        a.inc(cpu_field(offset_of!(Cpu, blocks_run)))
    }

    /// The vector registers that the block works on are in the host's from here on.
    pub fn enter_vectors(&mut self) -> Emit {
        let Some(width) = self.vectors else { return Ok(()) };
        let (missing, mut there) = (self.asm.create_label(), self.asm.create_label());
        self.asm.cmp(byte_ptr(rbp + VECTORS as i32), width as i32)?;
        self.asm.jb(missing)?;
        self.set_label(&mut there)?;
        self.gate = Some((missing, there));
        Ok(())
    }

    /// R13 = the host code of the block at the RIP in R15 that ran behind this one before; `miss` if there is none. Clobbers R14.
    pub fn find_linked(&mut self, miss: CodeLabel) -> Emit {
        let links = self.block + offset_of!(Block, links) as u64;
        let (mut found, mut second) = (self.asm.create_label(), self.asm.create_label());
        let a = &mut self.asm;
        a.mov(r14, links)?;
        a.mov(r13, cpu_field(offset_of!(Cpu, jump_context)))?;
        for (n, other) in [(0, second), (1, miss)] {
            let link = (n * size_of::<Link>()) as i32;
            if n == 1 {
                self.set_label(&mut second)?;
            }
            let a = &mut self.asm;
            a.cmp(qword_ptr(r14 + (link + offset_of!(Link, rip) as i32)), r15)?;
            a.jne(other)?;
            a.cmp(qword_ptr(r14 + (link + offset_of!(Link, context) as i32)), r13)?;
            a.jne(other)?;
            if n == 0 {
                a.mov(r14, qword_ptr(r14 + (link + offset_of!(Link, block) as i32)))?;
                a.jmp(found)?;
            } else {
                a.mov(r14, qword_ptr(r14 + (link + offset_of!(Link, block) as i32)))?;
            }
        }
        self.set_label(&mut found)?;
        self.code_of_block(miss)
    }

    /// R13 = the host code of the block that the jump cache has for the RIP in R15; `miss` if there is none. Clobbers R14.
    pub fn find_cached(&mut self, slots: usize, miss: CodeLabel) -> Emit {
        const { assert!(size_of::<Jump>() == 24) };
        let jumps = self.places.jumps;
        let a = &mut self.asm;
        a.mov(r14, r15)?;
        a.shr(r14, 14)?;
        a.xor(r14d, r15d)?;
        a.and(r14d, (slots - 1) as i32)?;
        a.lea(r14, qword_ptr(r14 + r14 * 2))?;
        a.mov(r13, jumps)?;
        a.lea(r14, qword_ptr(r13 + r14 * 8))?;
        a.cmp(qword_ptr(r14 + offset_of!(Jump, rip) as i32), r15)?;
        a.jne(miss)?;
        a.mov(r13, cpu_field(offset_of!(Cpu, jump_context)))?;
        a.cmp(qword_ptr(r14 + offset_of!(Jump, context) as i32), r13)?;
        a.jne(miss)?;
        a.mov(r14, qword_ptr(r14 + offset_of!(Jump, block) as i32))?;
        self.code_of_block(miss)
    }

    /// R13 = where other blocks enter the block in R14.
    fn code_of_block(&mut self, miss: CodeLabel) -> Emit {
        let a = &mut self.asm;
        a.cmp(byte_ptr(r14 + offset_of!(Block, valid) as i32), 0)?;
        a.je(miss)?;
        a.mov(r13, qword_ptr(r14 + offset_of!(Block, entry) as i32))?;
        a.test(r13, r13)?;
        a.je(miss)
    }

    /// Goes to the block at RIP R15, whose code is in R13.
    pub fn go(&mut self) -> Emit {
        self.asm.mov(block_rip(), r15)?;
        self.asm.jmp(r13)
    }

    /// Keeps the address of host code in R13 until [`Emitter::go_to_target`].
    pub fn keep_target(&mut self) -> Emit {
        self.asm.mov(cpu_field(TARGET), r13)
    }

    /// Goes to the block at RIP R15, whose code is the kept target.
    pub fn go_to_target(&mut self) -> Emit {
        self.asm.mov(block_rip(), r15)?;
        self.asm.jmp(cpu_field(TARGET))
    }

    /// Keeps R15, the target of a call, until [`Emitter::take_rip`].
    pub fn keep_rip(&mut self) -> Emit {
        self.asm.mov(cpu_field(TARGET_RIP), r15)
    }

    /// R15 = what [`Emitter::keep_rip`] kept.
    pub fn take_rip(&mut self) -> Emit {
        self.asm.mov(r15, cpu_field(TARGET_RIP))
    }

    /// Jumps if the condition of the conditional branch `insn` holds.
    pub fn jump_if(&mut self, insn: &Instruction, label: CodeLabel) -> Emit {
        let asm = &mut self.asm;
        match insn.condition_code() {
            ConditionCode::o => asm.jo(label),
            ConditionCode::no => asm.jno(label),
            ConditionCode::b => asm.jb(label),
            ConditionCode::ae => asm.jae(label),
            ConditionCode::e => asm.je(label),
            ConditionCode::ne => asm.jne(label),
            ConditionCode::be => asm.jbe(label),
            ConditionCode::a => asm.ja(label),
            ConditionCode::s => asm.js(label),
            ConditionCode::ns => asm.jns(label),
            ConditionCode::p => asm.jp(label),
            ConditionCode::np => asm.jnp(label),
            ConditionCode::l => asm.jl(label),
            ConditionCode::ge => asm.jge(label),
            ConditionCode::le => asm.jle(label),
            ConditionCode::g => asm.jg(label),
            ConditionCode::None => unreachable!("a conditional branch has a condition"),
        }
    }

    /// The code, with its cold end, assembled to run at `at`; and the offset behind the prologue.
    pub fn finish(mut self, at: u64, body: &CodeLabel) -> Emit<(Vec<u8>, u64)> {
        for Cold { mut label, index, back } in std::mem::take(&mut self.cold) {
            self.set_label(&mut label)?;
            self.call_resume(index)?;
            match back {
                Some((back, host_flags)) => {
                    if host_flags {
                        self.restore_flags()?;
                    }
                    self.asm.jmp(back)?;
                }
                None => self.asm.int3()?,
            }
        }
        if let (Some((mut missing, there)), Some(width)) = (self.gate, self.vectors) {
            self.set_label(&mut missing)?;
            self.asm.mov(r14, self.block)?;
            self.asm.call(self.places.gates[usize::from(width == Width::Ymm)])?;
            self.asm.jmp(there)?;
        }
        let result = self.asm.assemble_options(at, iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
        let body = result.label_ip(body)? - at;
        Ok((result.inner.code_buffer, body))
    }

    /// A guest instruction whose operands have been replaced by host registers and addresses.
    pub fn add(&mut self, mut insn: Instruction) -> Emit {
        insn.set_ip(0); // the assembler's own have none either
        self.asm.add_instruction(insn)
    }
}

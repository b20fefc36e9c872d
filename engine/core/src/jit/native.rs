//! What host code and the interpreter share while a guest runs: flags in the host's form, and the way back for one instruction.

use std::any::Any;
use std::mem::offset_of;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};

use super::x87;
use crate::cpu::Cpu;
use crate::decode::block::Block;
use crate::flags::Flags;
use crate::pmu::Watching;
use crate::state::rflags::OF;
use crate::uop::{Exec, Stop};

/// The part of a CPU that host code keeps for itself.
#[repr(C)]
pub struct Native {
    /// Arithmetic flags: OF in the low byte (0 or 1), what LAHF gives in the high byte.
    flags: u16,
    /// Where a call goes while its return address is pushed: host code, and RIP.
    target: u64,
    target_rip: u64,
    /// The block that was left by [`resume`], or that was not begun, and RIP of its first instruction.
    block: *mut Block,
    pub rip: u64,
    /// How much of the guest's vector registers is in the host's: nothing, or a `vector::Width`.
    vectors: u8,
    /// 1 if the guest's x87 unit is in the host's, or just was and is in `image`.
    pub(super) x87: u8,
    /// `vectors` and `x87` as they are to be again behind an instruction in the interpreter.
    kept: u16,
    /// The x87 unit on its way from the guest to the host or back.
    pub(super) image: x87::Image,
    /// MXCSR as Rust code expects it.
    default_mxcsr: u32,
    /// The panic that host code must not be unwound for.
    panic: Option<Box<dyn Any + Send>>,
}

impl Default for Native {
    fn default() -> Self {
        Native {
            flags: 0,
            target: 0,
            target_rip: 0,
            block: std::ptr::null_mut(),
            rip: 0,
            vectors: 0,
            x87: 0,
            kept: 0,
            image: x87::Image::default(),
            default_mxcsr: 0x1f80,
            panic: None,
        }
    }
}

/// Offset of the flags in a CPU.
pub const FLAGS: usize = offset_of!(Cpu, native) + offset_of!(Native, flags);
/// Offsets of the target of a call in a CPU.
pub const TARGET_RIP: usize = offset_of!(Cpu, native) + offset_of!(Native, target_rip);
pub const TARGET: usize = offset_of!(Cpu, native) + offset_of!(Native, target);

/// Offset of the block that was left.
pub const BLOCK: usize = offset_of!(Cpu, native) + offset_of!(Native, block);
/// Offsets of what [`super::vector_registers`] keeps.
pub const VECTORS: usize = offset_of!(Cpu, native) + offset_of!(Native, vectors);
pub const X87: usize = offset_of!(Cpu, native) + offset_of!(Native, x87);
pub const KEPT: usize = offset_of!(Cpu, native) + offset_of!(Native, kept);
pub const IMAGE: usize = offset_of!(Cpu, native) + offset_of!(Native, image);
pub const DEFAULT_MXCSR: usize = offset_of!(Cpu, native) + offset_of!(Native, default_mxcsr);

/// The part of `Native::kept` that is about the x87 unit.
const KEPT_X87: u16 = 1 << 8;

/// What host code returns besides the numbers of [`Stop`].
pub mod status {
    /// The instruction is done, and host code goes on.
    pub const DONE: u32 = 0;
    /// RIP is at a block that did not begin, because the dispatcher has work.
    pub const BOUNDARY: u32 = 0x100;
    /// A handler panicked.
    pub const PANIC: u32 = 0x101;
    /// A block did not begin, although it was paid for, because the interpreter must run it.
    pub const REFUSED: u32 = 0x102;
}

/// Host code: the trampoline that enters a block.
pub type Trampoline = unsafe extern "sysv64" fn(cpu: *mut Cpu, code: *const u8) -> u32;

impl Native {
    fn load(&mut self, flags: Flags) {
        let image = flags.bits();
        self.flags = (image as u16 & 0xff) << 8 | u16::from(image & OF != 0);
    }

    fn flags(&self) -> Flags {
        Flags::from_bits(u64::from(self.flags >> 8) | if self.flags & 1 != 0 { OF } else { 0 })
    }
}

impl Cpu {
    /// Runs the host code of `block`, and of the blocks that it leads to, until one of them stops.
    #[inline(never)]
    pub(crate) fn run_native(&mut self, block: *mut Block, body: *const u8) -> Exec<*mut Block> {
        let Some(translator) = &self.translator else { unreachable!("host code without a translator") };
        let trampoline = translator.trampoline();
        // SAFETY: the dispatcher has just looked the block up.
        self.budget -= i64::from(unsafe { (*block).instructions });
        self.blocks_run += 1;
        self.native.load(self.flags);
        // SAFETY: `body` is the start of a live block's host code, which keeps to the rules of this module.
        let status = unsafe { trampoline(self, body) };
        if self.pmu.watching != Watching::NONE {
            self.take_records();
        }
        if self.native.x87 != 0 {
            self.take_x87(None);
        }
        match status {
            status::BOUNDARY => {
                self.flags = self.native.flags();
                Ok(std::ptr::null_mut())
            }
            status::REFUSED => {
                self.flags = self.native.flags();
                let block = self.native.block;
                self.native.rip = self.rip();
                // SAFETY: host code named the block that it did not begin.
                self.budget += i64::from(unsafe { (*block).instructions });
                self.blocks_run -= 1;
                self.interpret(block)
            }
            status::PANIC => resume_unwind(self.native.panic.take().unwrap_or_else(|| Box::new("a handler panicked"))),
            _ => self.stopped_native(status),
        }
    }

    /// A handler stopped host code.
    fn stopped_native(&mut self, status: u32) -> Exec<*mut Block> {
        let block = self.native.block;
        let Some(stop) = stop(status) else { unreachable!("host code returned {status}") };
        if stop == Stop::Next {
            return Ok(block);
        }
        // SAFETY: `resume` set both; blocks are freed by `collect` only.
        let (uop, left) = unsafe {
            let index = self.at.offset_from((*block).uops.as_ptr()) as i64;
            (&*self.at, i64::from((*block).instructions) - index)
        };
        self.leave(uop, stop, left)?;
        Ok(std::ptr::null_mut())
    }
}

fn stop(status: u32) -> Option<Stop> {
    const STOPS: [Stop; 7] = [Stop::Next, Stop::Leave, Stop::Fault, Stop::Exit, Stop::Again, Stop::Slow, Stop::Retry];
    STOPS.into_iter().find(|stop| *stop as u32 == status)
}

/// Runs instruction `index` of `block` with its reference handler; the way back from host code, which has stored all registers.
///
/// # Safety
/// Host code of `block` calls this on the CPU that runs it.
pub unsafe extern "sysv64" fn resume(cpu: *mut Cpu, block: *mut Block, index: u32) -> u32 {
    // SAFETY: by the caller's promise both are valid, and host code holds no references. The handler may kill the block, which stays
    // allocated, so nothing but `uop` is borrowed from it meanwhile.
    let (cpu, uop, handler) = unsafe {
        let (uops, reference) = (&(*block).uops, &(*block).reference);
        let uop = uops[index as usize];
        (&mut *cpu, uop, reference.get(index as usize).copied().unwrap_or(uop.run))
    };
    cpu.flags = cpu.native.flags();
    (cpu.native.block, cpu.native.rip) = (block, cpu.rip());
    if cpu.native.x87 != 0 {
        // SAFETY: as above.
        cpu.take_x87(Some((unsafe { &*block }, index as usize)));
    }
    // SAFETY: as above.
    cpu.at = unsafe { &raw const (&(*block).uops)[index as usize] };
    if cpu.pmu.watching != Watching::NONE {
        cpu.take_records();
    }
    let result = catch_unwind(AssertUnwindSafe(|| handler(cpu, &uop)));
    // SAFETY: as above; a dead block is freed by `collect` only.
    let valid = unsafe { (*block).valid };
    match result {
        Ok(Ok(())) if valid => {
            cpu.native.load(cpu.flags);
            if cpu.native.kept & KEPT_X87 != 0 {
                cpu.give_x87();
            }
            status::DONE
        }
        Ok(Ok(())) => {
            // SAFETY: an instruction that goes on is not the last micro-op.
            cpu.at = unsafe { cpu.at.add(1) };
            Stop::Retry as u32
        }
        Ok(Err(stop)) => stop as u32,
        Err(panic) => {
            cpu.native.panic = Some(panic);
            status::PANIC
        }
    }
}

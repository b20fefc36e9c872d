//! The silicon: an x86-64 CPU with virtual machine extensions, in software.
//!
//! This crate is hardware. It knows no KVM, no devices and no Python; a hypervisor drives it through a [`virt::control::Block`] and a
//! [`memory::nested::NestedPageTable`].

pub mod cpu;
pub mod decode;
pub mod exec;
pub mod fault;
pub mod flags;
pub mod interrupts;
#[cfg(target_arch = "x86_64")]
pub mod jit;
#[cfg(not(target_arch = "x86_64"))]
#[path = "jit/absent.rs"]
pub mod jit;
pub mod memory;
pub mod model;
pub mod paging;
pub mod pmu;
pub mod state;
pub mod uop;
pub mod virt;
pub mod word;

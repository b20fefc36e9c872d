//! Virtual machine extensions: the control block, VM entry and VM exit.

pub mod apic;
pub mod bitmaps;
pub mod control;
pub mod entry;
pub mod exits;
pub mod halt;

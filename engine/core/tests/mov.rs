//! Data movement against the host's CPU.
#![cfg(target_arch = "x86_64")]

mod common;

use common::host::{Comparison, Form};

#[test]
fn mov_between_registers_and_memory() {
    let mut both = Comparison::new(1);
    for opcode in [&[0x88u8] as &'static [u8], &[0x89], &[0x8a], &[0x8b]] {
        both.check_modrm(&Form::new(opcode), 50);
    }
}

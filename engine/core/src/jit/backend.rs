//! The seam between blocks and host code: what a back end is asked for. One stands behind it, for hosts that are x86-64 themselves.
//!
//! Everything else about translations is the same for every back end: which blocks get one (`Translator`), links ([`super::link`]), and
//! what Rust code does for host code ([`super::native`]).

use std::io;
use std::ops::Range;

use iced_x86::Instruction;

use super::flags::Recipe;
use super::link::Exit;
use super::native::Trampoline;
use super::x64::X64;
use crate::decode::block::Block;
use crate::model::Model;

/// Host code of a block.
pub struct HostCode {
    /// Where other blocks enter it.
    pub entry: *const u8,
    /// Where the dispatcher does, which has paid for it.
    pub body: *const u8,
    pub exits: Vec<Exit>,
    /// It is of use to come with flags that are not in memory.
    pub takes_recipes: bool,
}

/// How a translation is come to.
#[derive(Clone, Copy, Default)]
pub struct Arrival {
    /// How the guest's flags are made. Without one they are in memory.
    pub recipe: Option<Recipe>,
    /// Number of the translation's first exit.
    pub first_exit: u32,
}

/// What became of a block.
pub enum Made {
    Code(HostCode),
    /// The interpreter must go on running it.
    Refused,
    /// Nothing: there is room now, but everything at these addresses must be forgotten first.
    Full(Range<u64>),
}

/// Makes host code for one core. It never runs while code is made.
pub trait Backend: Send {
    /// Makes host code for `block`, which was decoded from `instructions`.
    fn translate(&mut self, block: &Block, instructions: &[Instruction], model: &Model, arrival: Arrival) -> Made;

    /// What enters host code.
    fn trampoline(&self) -> Trampoline;

    /// Host code that stands for that of a block without any: back to the dispatcher.
    fn nowhere(&self) -> *const u8;

    /// Bytes of memory that host code has been in.
    fn bytes(&self) -> usize;
}

/// The back end of this host, with `size` bytes for host code.
pub fn of_host(size: usize) -> io::Result<Box<dyn Backend>> {
    Ok(Box::new(X64::new(size)?))
}

//! The back end for hosts that are x86-64 themselves.

use std::io;
use std::ptr;

use iced_x86::Instruction;

use super::arena::Arena;
use super::asm::Asm;
use super::backend::{Arrival, Backend, HostCode, Made};
use super::block::{self, Code, Ground};
use super::exits::ExitSite;
use super::link::{Exit, Shortcut};
use super::native::Trampoline;
use super::plan::Host;
use super::stubs::{self, Stubs};
use crate::decode::block::Block;
use crate::model::Model;

/// See [`super`] for its parts.
pub struct X64 {
    arena: Arena,
    asm: Asm,
    stubs: Stubs,
    host: Host,
}

impl X64 {
    /// A back end with `size` bytes for host code.
    pub fn new(size: usize) -> io::Result<Self> {
        let mut arena = Arena::new(size)?;
        let mut asm = Asm::default();
        let host = Host::new();
        let stubs = stubs::write(&mut arena, &mut asm, host).ok_or(io::ErrorKind::OutOfMemory)?;
        arena.keep();
        Ok(X64 { arena, asm, stubs, host })
    }

    /// An exit of the translation at `entry`.
    fn placed(&self, entry: *const u8, site: &ExitSite) -> Exit {
        let writable = |offset: usize| self.arena.writable(entry.wrapping_add(offset));
        Exit {
            distance: site.distance,
            field: writable(site.end - 4),
            end: entry as u64 + site.end as u64,
            unlinked: self.asm.offset(site.unlinked) as i32 - site.end as i32,
            guards: site.guards.map(|guards| guards.map(writable)),
            shortcut: site.shortcut.map(|shortcut| Shortcut {
                recipe: shortcut.recipe,
                field: writable(shortcut.end - 4),
                end: entry as u64 + shortcut.end as u64,
                otherwise: shortcut.otherwise.map(|label| self.asm.offset(label) as i32 - shortcut.end as i32),
            }),
        }
    }
}

impl Backend for X64 {
    fn translate(&mut self, block: &Block, instructions: &[Instruction], model: &Model, arrival: Arrival) -> Made {
        self.asm.begin(self.arena.next());
        let ground = Ground { host: self.host, places: self.stubs.places, first_cell: self.arena.next_cell() };
        let code = block::translate(&mut self.asm, block, instructions, model, ground, arrival);
        let Some(Code { body, exits, takes_recipes, cells }) = code else { return Made::Refused };
        let bytes = self.asm.finish();
        if !self.arena.has_room_for(bytes.len(), cells.len()) {
            return Made::Refused;
        }
        let Some(entry) = self.arena.add(bytes, &cells) else { return Made::Full(self.arena.take_segment()) };
        let body = entry.wrapping_add(self.asm.offset(body));
        Made::Code(HostCode { entry, body, exits: exits.iter().map(|site| self.placed(entry, site)).collect(), takes_recipes })
    }

    fn trampoline(&self) -> Trampoline {
        self.stubs.trampoline
    }

    fn nowhere(&self) -> *const u8 {
        ptr::with_exposed_provenance(self.stubs.places.unknown as usize)
    }

    fn bytes(&self) -> usize {
        self.arena.used()
    }
}

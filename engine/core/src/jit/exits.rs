//! Host code between blocks: the head of a block, direct ways to the next one, and those whose target is known only when they are taken.
//!
//! While host code runs, RIP is not kept: `Native::page` is the linear page of the running block, whose place in the page is known. A
//! direct exit is a jump that [`super::link`] writes; until then it leads there.

use std::mem::offset_of;

use iced_x86::Register::{R13, R13D, R14, R14D, R15, RSP};
use iced_x86::{ConditionCode, Register};

use super::asm::{qword_ptr, Label, Memory};
use super::emit::{cpu_field, Emitter};
use super::flags::{Recipe, Whereabouts};
use super::link::NO_GUARD;
use super::native::{detour, CONTEXT_FIELD, HOST_STACK, HOST_STACK_END, JUMPS, PAGE, TARGET_RIP};
use super::registers::{BUDGET, STACK};
use crate::decode::block::Block;
use crate::decode::cache::{Jump, JUMP_BITS, JUMP_SLOTS};
use crate::memory::{PAGE_OFFSET, PAGE_SIZE};

/// A direct exit in the making.
pub struct ExitSite {
    pub distance: i64,
    /// Offset of the byte behind the jump's distance.
    pub end: usize,
    /// The way to [`super::link`].
    pub unlinked: Label,
    /// Offsets of the guards' immediates.
    pub guards: Option<[usize; 2]>,
    pub shortcut: Option<ShortcutSite>,
}

/// A jump past the code that saves the flags, to who knows their recipe: in the making.
#[derive(Clone, Copy)]
pub struct ShortcutSite {
    pub recipe: Recipe,
    /// Offset of the byte behind the jump.
    pub end: usize,
    /// Where it goes as long as there is no such target: on, if nowhere.
    pub otherwise: Option<Label>,
}

/// A conditional exit whose flags are not in memory: what comes of it at the end of the code.
pub struct Way {
    distance: i64,
    shortcut: ShortcutSite,
    label: Label,
}

impl Emitter<'_> {
    /// What a jump meets before the block's first instruction: the block is paid for, and the dispatcher asked when nothing is left.
    /// Returns the label behind.
    pub fn head(&mut self, instructions: u32) -> Label {
        let [body, exhausted] = [(); 2].map(|()| self.asm.create_label());
        self.asm.set_label(self.start);
        self.asm.sub(BUDGET, instructions as i32);
        self.asm.jcc(ConditionCode::s, exhausted);
        self.asm.set_label(body);
        self.cold(exhausted, detour::HEAD, Some((body, false)));
        body
    }

    // ---- to a target that is known ------------------------------------------------------------------------------------------------------

    /// Whether the target at `distance` is in the block's page.
    pub fn is_near(&self, distance: i64) -> bool {
        (0..PAGE_SIZE as i64).contains(&(self.offset as i64 + distance))
    }

    /// Goes to `distance` bytes behind the block's first byte. With `checked`, translations may have changed in this block.
    pub fn exit(&mut self, distance: i64, checked: bool) {
        let guarded = checked || !self.is_near(distance);
        let recipe = self.flags.recipe.filter(|_| !self.flags.saved && !guarded);
        let shortcut = recipe.map(|recipe| {
            self.asm.no_jump();
            ShortcutSite { recipe, end: self.asm.len(), otherwise: None }
        });
        self.save_flags();
        let unlinked = self.way_to_link();
        let guards = guarded.then(|| self.guard(distance, unlinked));
        self.asm.jmp(unlinked);
        self.exits.push(ExitSite { distance, end: self.asm.len(), unlinked, guards, shortcut });
    }

    /// Goes to `distance`, which is near, if `condition` holds. The host's flags are the guest's.
    pub fn exit_near_if(&mut self, condition: ConditionCode, distance: i64) {
        if let Some(recipe) = self.flags.recipe.filter(|_| !self.flags.saved) {
            let label = self.asm.create_label();
            self.asm.jcc(condition, label);
            let shortcut = ShortcutSite { recipe, end: self.asm.len(), otherwise: Some(label) };
            self.ways.push(Way { distance, shortcut, label });
            return;
        }
        let unlinked = self.way_to_link();
        self.asm.jcc(condition, unlinked);
        self.exits.push(ExitSite { distance, end: self.asm.len(), unlinked, guards: None, shortcut: None });
    }

    /// Writes the code of conditional exits behind which the flags are saved.
    pub(super) fn finish_ways(&mut self) {
        for Way { distance, shortcut, label } in std::mem::take(&mut self.ways) {
            self.asm.set_label(label);
            self.flags = Whereabouts { host: true, saved: false, recipe: None };
            self.save_flags();
            let unlinked = self.way_to_link();
            self.asm.jmp(unlinked);
            self.exits.push(ExitSite { distance, end: self.asm.len(), unlinked, guards: None, shortcut: Some(shortcut) });
        }
    }

    fn way_to_link(&mut self) -> Label {
        let unlinked = self.asm.create_label();
        self.cold(unlinked, detour::LINK + self.first_exit + self.exits.len() as u32, None);
        unlinked
    }

    /// Goes to `unlinked` unless the block runs where, and the translations are those with which, the exit was linked; else enters the
    /// target's page. Returns where these two are kept in the code.
    fn guard(&mut self, distance: i64, unlinked: Label) -> [usize; 2] {
        let guards = [PAGE, CONTEXT_FIELD].map(|field| {
            self.asm.mov_wide(R13, NO_GUARD);
            let immediate = self.asm.len() - 8;
            self.asm.cmp(cpu_field(field), R13);
            self.asm.jne(unlinked);
            immediate
        });
        let pages = (self.offset as i64 + distance) & !(PAGE_OFFSET as i64);
        match i32::try_from(pages) {
            Ok(0) => {}
            Ok(pages) => self.asm.add(cpu_field(PAGE), pages),
            Err(_) => {
                self.asm.mov(R13, pages as u64);
                self.asm.add(cpu_field(PAGE), R13);
            }
        }
        guards
    }

    // ---- to a target that is computed ---------------------------------------------------------------------------------------------------

    /// `to` = RIP `distance` bytes behind the block's first byte. Changes nothing else.
    pub fn rip_at(&mut self, to: Register, distance: i64) {
        let distance = self.offset as i64 + distance;
        self.asm.mov(to, cpu_field(PAGE));
        match i32::try_from(distance) {
            Ok(distance) => self.asm.lea(to, qword_ptr(to, distance)),
            Err(_) => {
                self.asm.lea(to, qword_ptr(to, i32::MAX));
                self.asm.lea(to, qword_ptr(to, (distance - i64::from(i32::MAX)) as i32));
            }
        }
    }

    /// Goes to RIP R15: to the block that the jump cache has for it, or to the dispatcher.
    pub fn go_to_r15(&mut self) {
        let entry = self.find_r15();
        self.asm.jmp_indirect(entry);
    }

    /// Where the host code of the block is that the jump cache has for RIP R15; to the dispatcher if it has none. Enters that block's page.
    fn find_r15(&mut self) -> Memory {
        const SHIFT: u8 = size_of::<Jump>().trailing_zeros() as u8;
        const { assert!(size_of::<Jump>().is_power_of_two()) };
        let unknown = self.places.unknown;
        let a = &mut *self.asm;
        // Both parts of the slot's number are shifted at once: all else waits for it.
        a.mov(R14, R15);
        a.shr(R14, JUMP_BITS - SHIFT);
        a.mov(R13, R15);
        a.shl(R13, SHIFT);
        a.xor(R14D, R13D);
        a.and(R14D, ((JUMP_SLOTS - 1) << SHIFT) as i32);
        if self.salt != 0 {
            a.xor(R14D, self.salt << SHIFT);
        }
        a.add(R14, cpu_field(JUMPS));
        a.cmp(qword_ptr(R14, offset_of!(Jump, rip) as i32), R15);
        a.jne(unknown);
        a.mov(R13, cpu_field(CONTEXT_FIELD));
        a.cmp(qword_ptr(R14, offset_of!(Jump, context) as i32), R13);
        a.jne(unknown);
        a.mov(R13, R15);
        a.and(R13, !(PAGE_OFFSET as i32));
        a.mov(cpu_field(PAGE), R13);
        a.mov(R14, qword_ptr(R14, offset_of!(Jump, block) as i32));
        qword_ptr(R14, offset_of!(Block, entry) as i32)
    }

    // ---- calls and returns --------------------------------------------------------------------------------------------------------------

    /// Calls the target at `distance`, with the guest's return address in R15, which is `back` bytes behind the block's first byte, in its
    /// page.
    ///
    /// Calls are the host's own, and so are returns that go back to where the last call came from, which the host's processor foresees.
    /// Beside each of the host's return addresses is the guest's, by which a return knows its call. A context does not change while calls
    /// wait, because host code is left for that, and forgets them.
    pub fn call(&mut self, distance: i64, back: i64) {
        let unlinked = self.way_to_link();
        let guards = (!self.is_near(distance)).then(|| self.guard(distance, unlinked));
        self.push_call();
        self.asm.call(unlinked);
        self.exits.push(ExitSite { distance, end: self.asm.len(), unlinked, guards, shortcut: None });
        self.come_back(back);
    }

    /// The same for a call to RIP R15, behind [`Emitter::push_call`].
    pub fn call_r15(&mut self, back: i64) {
        let entry = self.find_r15();
        self.asm.call_indirect(entry);
        self.come_back(back);
    }

    /// Keeps the guest's return address, which is in R15, for the return.
    pub fn push_call(&mut self) {
        let [full, room] = [(); 2].map(|()| self.asm.create_label());
        self.asm.cmp(RSP, cpu_field(HOST_STACK_END));
        self.asm.jcc(ConditionCode::b, full);
        self.asm.set_label(room);
        self.asm.push(R15);
        self.full_stacks.push((full, room));
    }

    /// Cold code of calls for which the host's stack has no room.
    pub(super) fn finish_calls(&mut self) {
        for (full, room) in std::mem::take(&mut self.full_stacks) {
            self.asm.set_label(full);
            self.forget_calls();
            self.asm.jmp(room);
        }
    }

    fn come_back(&mut self, back: i64) {
        self.asm.lea(RSP, qword_ptr(RSP, 8));
        self.exit(back, false);
    }

    /// Goes to `other` unless RIP R15 is where the last call came from.
    pub fn expect_call(&mut self, other: Label) {
        self.asm.cmp(R15, qword_ptr(RSP, 8));
        self.asm.jne(other);
    }

    /// Returns to RIP R15, where the last call came from.
    pub fn return_to_call(&mut self, released: i32) {
        let a = &mut *self.asm;
        a.lea(STACK, qword_ptr(STACK, released));
        a.and(R15, !(PAGE_OFFSET as i32));
        a.mov(cpu_field(PAGE), R15);
        a.ret();
    }

    /// The guest's returns do not match its calls, as where it switches stacks: host code forgets all that wait.
    pub fn forget_calls(&mut self) {
        self.asm.mov(RSP, cpu_field(HOST_STACK));
    }

    /// Keeps R15, the target of a call, until [`Emitter::take_rip`].
    pub fn keep_rip(&mut self) {
        self.asm.mov(cpu_field(TARGET_RIP), R15);
    }

    /// R15 = what [`Emitter::keep_rip`] kept.
    pub fn take_rip(&mut self) {
        self.asm.mov(R15, cpu_field(TARGET_RIP));
    }
}

/// The condition that holds when `condition` does not.
pub fn opposite(condition: ConditionCode) -> ConditionCode {
    use ConditionCode::*;
    match condition {
        o => no,
        no => o,
        b => ae,
        ae => b,
        e => ne,
        ne => e,
        be => a,
        a => be,
        s => ns,
        ns => s,
        p => np,
        np => p,
        l => ge,
        ge => l,
        le => g,
        g => le,
        None => unreachable!("a conditional branch has a condition"),
    }
}

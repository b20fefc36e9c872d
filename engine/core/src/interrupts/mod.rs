//! Exceptions and interrupts: interception by the hypervisor, side effects, double faults, and delivery through the IDT.
//!
//! Sources: SDM vol. 3, ch. 6 (delivery), 25.9.2 and 25.9.3 (what exits tell), 26.6 (injection), 27.2 (exits during delivery); APM vol. 2,
//! ch. 8 and 15.7, 15.12. One file per form of the IDT: `real`, `protected`, `long`.

mod gate;
mod intercept;
mod long;
mod protected;
mod real;
mod software;

use crate::cpu::breakpoint::{dr6, dr7};
use crate::cpu::{pending, Cpu};
use crate::fault::{vector, Fault};
use crate::pmu::branch::Kind as Branch;
use crate::pmu::debugctl;
use crate::state::{activity, cr0, interruptibility, rflags};
use crate::uop::{slot, Exec, Stop};
use crate::virt::exits::code;

/// Bit 0 of an error code: the fault happened while an event from outside the program was delivered.
const EXTERNAL: u32 = 1;

/// What an event is; the numbers are those of interruption information (SDM vol. 3, table 25-17).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    External = 0,
    Nmi = 2,
    Exception = 3,
    /// INT n.
    Software = 4,
    /// INT1.
    PrivilegedException = 5,
    /// INT3 and INTO.
    SoftwareException = 6,
}

impl Kind {
    const fn from_info(info: u32) -> Option<Kind> {
        Some(match info >> 8 & 7 {
            0 => Kind::External,
            2 => Kind::Nmi,
            3 => Kind::Exception,
            4 => Kind::Software,
            5 => Kind::PrivilegedException,
            6 => Kind::SoftwareException,
            _ => return None,
        })
    }

    /// Whether an instruction asked for the event, so that the DPL of its gate counts.
    const fn checks_gate(self) -> bool {
        matches!(self, Kind::Software | Kind::SoftwareException)
    }

    /// Whether the event comes from an instruction that is complete when its handler runs.
    const fn by_instruction(self) -> bool {
        matches!(self, Kind::Software | Kind::SoftwareException | Kind::PrivilegedException)
    }
}

/// One event on its way to a handler.
#[derive(Clone, Copy, Debug)]
struct Event {
    vector: u8,
    kind: Kind,
    error: Option<u32>,
    /// See [`Fault::payload`].
    payload: u64,
    /// RIP that the handler returns to.
    return_rip: u64,
    /// RFLAGS that the handler finds on its stack.
    flags: u64,
}

/// How two exceptions in a row combine (SDM vol. 3, table 6-4).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

impl Event {
    fn class(&self) -> Class {
        if self.kind != Kind::Exception {
            return Class::Benign;
        }
        match self.vector {
            vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
            vector::PF => Class::PageFault,
            vector::DF => Class::DoubleFault,
            _ => Class::Benign,
        }
    }

    /// The kind of branch that the delivery is.
    fn branch(&self) -> Branch {
        match self.kind {
            Kind::External | Kind::Nmi => Branch::Interrupt,
            Kind::Exception => Branch::Exception,
            Kind::Software | Kind::PrivilegedException | Kind::SoftwareException => Branch::SoftwareInterrupt,
        }
    }

    /// Whether the event is #DB and not INT 1: it takes the place of the debug traps that wait.
    fn is_debug_exception(&self) -> bool {
        self.vector == vector::DB && matches!(self.kind, Kind::Exception | Kind::PrivilegedException)
    }

    /// The error code that faults during the delivery of this event carry in bit 0.
    fn external_bit(&self) -> u32 {
        if self.kind.checks_gate() {
            0
        } else {
            EXTERNAL
        }
    }
}

impl Cpu {
    /// Delivers the exception in `fault`, raised by the instruction at RIP; RIP is exact.
    pub fn deliver_fault(&mut self) -> Exec {
        let event = self.exception(self.fault);
        self.deliver(event, true)
    }

    /// Delivers the event that a hypervisor injects at VM entry (SDM vol. 3, 25.8.3 and 26.6.1). The information field has been checked.
    pub fn deliver_event(&mut self, info: u32, error: u32, instruction_length: u32) -> Exec {
        let Some(kind) = Kind::from_info(info) else {
            return Err(self.exit(code::INVALID_STATE, 0));
        };
        let event = Event {
            vector: info as u8,
            kind,
            error: (info & 1 << 11 != 0).then_some(error),
            payload: 0,
            return_rip: self.injected_return(info as u8, kind, instruction_length),
            flags: self.rflags(),
        };
        let delivered = self.deliver(event, false);
        if delivered.is_err() && kind.by_instruction() && !self.model.is_amd() {
            self.exit.instruction_length = instruction_length; // as the entry was told (SDM vol. 3, 28.2.5)
        }
        delivered?;
        if kind == Kind::Nmi {
            self.state.interruptibility |= interruptibility::NMI;
        }
        Ok(())
    }

    /// Where an injected event returns to: on Intel silicon behind the instruction whose length the hypervisor gives (SDM vol. 3, 26.6.1),
    /// on AMD's at the next RIP of the control block, or where that is not saved at RIP itself, which the hypervisor has moved.
    fn injected_return(&self, vector: u8, kind: Kind, instruction_length: u32) -> u64 {
        if self.model.is_amd() {
            let soft = kind == Kind::Software || kind == Kind::Exception && matches!(vector, vector::BP | vector::OF);
            return if soft && self.model.saves_next_rip() { self.control.next_rip } else { self.rip() };
        }
        self.rip_at(if kind.by_instruction() { instruction_length.into() } else { 0 })
    }

    /// The event of an exception that the current instruction raised.
    fn exception(&self, fault: Fault) -> Event {
        // Faults restart their instruction, which must not hit its own breakpoint again (SDM vol. 3, 17.3.1.1). Debug exceptions are
        // traps, but for the access to a protected debug register.
        let restarts = match fault.vector {
            vector::DB => fault.payload & dr6::BD != 0,
            vector => vector != vector::DF,
        };
        let resume = if restarts { rflags::RF } else { 0 };
        Event {
            vector: fault.vector,
            kind: Kind::Exception,
            error: fault.error.filter(|_| self.state.cr0 & cr0::PE != 0),
            payload: fault.payload,
            return_rip: self.rip(),
            flags: self.rflags() | resume,
        }
    }

    /// Delivers `event`, and what its delivery raises in turn. `fresh`: the event is the guest's own, so the hypervisor may intercept it
    /// and its side effects are still to come.
    fn deliver(&mut self, mut event: Event, fresh: bool) -> Exec {
        let mut own = fresh;
        loop {
            if own {
                if event.is_debug_exception() {
                    self.set_traps(0);
                }
                self.intercept_exception(&event)?;
                self.side_effects(&event);
            }
            (self.vectoring, self.vectoring_error) = (self.event_info(&event), event.error.unwrap_or(0));
            let (from, level) = (self.rip(), self.cpl());
            let outcome = self.vector(&event);
            if outcome.is_ok() && self.pmu.watched != 0 {
                self.note_delivery(event.branch(), event.vector, from, level);
            }
            if outcome != Err(Stop::Fault) {
                (self.vectoring, self.vectoring_error) = (0, 0);
                return outcome;
            }
            event = self.escalate(&event)?;
            own = true;
        }
    }

    /// The event that follows when the delivery of `first` raised `fault`. While it is being found, exits tell of `first`.
    fn escalate(&mut self, first: &Event) -> Exec<Event> {
        if matches!(self.fault.vector, vector::TS | vector::NP | vector::SS | vector::GP) {
            self.fault.error = self.fault.error.map(|error| error | first.external_bit());
        }
        let second = self.exception(self.fault);
        let doubles = match (first.class(), second.class()) {
            (Class::DoubleFault, Class::Contributory | Class::PageFault) => {
                (self.vectoring, self.vectoring_error) = (0, 0);
                return Err(self.exit(code::TRIPLE_FAULT, 0));
            }
            (Class::Contributory, Class::Contributory) => true,
            (Class::PageFault, Class::Contributory | Class::PageFault) => true,
            _ => false,
        };
        if !doubles {
            return Ok(second);
        }
        // The hypervisor sees the second exception before it becomes a double fault.
        let checked = self.intercept_exception(&second);
        (self.vectoring, self.vectoring_error) = (0, 0);
        checked?;
        self.side_effects(&second);
        Ok(self.exception(Fault { vector: vector::DF, error: Some(0), payload: 0 }))
    }

    /// What an exception does to registers besides its delivery.
    fn side_effects(&mut self, event: &Event) {
        if event.kind != Kind::Exception {
            return;
        }
        match event.vector {
            vector::PF => self.state.cr2 = event.payload,
            vector::DB => {
                self.state.dr6 = self.state.dr6 & !dr6::BREAKPOINTS | event.payload | dr6::FIXED;
                self.state.dr7 &= !dr7::GD;
                self.stop_branch_debugging();
            }
            _ => {}
        }
    }

    /// A debug exception turns branch records and stepping by branches off (SDM vol. 3, 18.4.1).
    fn stop_branch_debugging(&mut self) {
        self.state.debugctl &= !(debugctl::LBR | debugctl::BTF);
        if self.pmu.watched != 0 {
            self.choose_watch();
        }
    }

    /// Runs the IDT entry of `event`.
    fn vector(&mut self, event: &Event) -> Exec {
        if self.ia32e() {
            self.vector_long(event)?;
        } else if self.state.cr0 & cr0::PE != 0 {
            self.vector_protected(event)?;
        } else {
            self.vector_real(event)?;
        }
        self.end_wait();
        Ok(())
    }

    /// An event ends HLT and interrupt shadows.
    fn end_wait(&mut self) {
        self.state.activity = activity::ACTIVE;
        self.state.interruptibility &= !(interruptibility::STI | interruptibility::MOV_SS);
        self.pending &= !(pending::HALTED | pending::SHADOW);
    }

    /// Runs `deliver` for an event of the current instruction with RIP where the instruction is, as the interfaces above expect it.
    fn deliver_at(&mut self, event: Event, instruction: u64) -> Exec {
        let block = self.rip();
        self.regs[slot::RIP as usize] = instruction;
        match self.deliver(event, true) {
            Ok(()) => Err(Stop::Next),
            Err(stop) => {
                self.regs[slot::RIP as usize] = block;
                Err(stop)
            }
        }
    }
}

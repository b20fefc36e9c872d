//! Exceptions that the hypervisor wants to see (SDM vol. 3, 25.6.3, 25.9.2 and 27.2.1; APM vol. 2, 15.12).

use super::{Event, Kind};
use crate::cpu::Cpu;
use crate::fault::vector;
use crate::uop::Exec;
use crate::virt::exits::code;

/// Interruption information is valid.
const VALID: u32 = 1 << 31;
/// Interruption information has an error code.
const HAS_ERROR: u32 = 1 << 11;

impl Cpu {
    /// Exits when the hypervisor intercepts the exception.
    pub(super) fn intercept_exception(&mut self, event: &Event) -> Exec {
        let exception = matches!(event.kind, Kind::Exception | Kind::SoftwareException | Kind::PrivilegedException);
        if !exception || !self.exception_intercepted(event) {
            return Ok(());
        }
        if self.model.is_amd() {
            self.exit_exception_svm(event)
        } else {
            self.exit_exception_vmx(event)
        }
    }

    fn exception_intercepted(&self, event: &Event) -> bool {
        let control = &self.control;
        let intercepted = control.exception_bitmap >> event.vector & 1 != 0;
        if event.vector != vector::PF || self.model.is_amd() {
            return intercepted;
        }
        let selected = event.error.unwrap_or(0) & control.page_fault_error_mask == control.page_fault_error_match;
        intercepted == selected
    }

    #[cold]
    fn exit_exception_vmx(&mut self, event: &Event) -> Exec {
        let qualification = if matches!(event.vector, vector::PF | vector::DB) { event.payload } else { 0 };
        let stop = self.exit(code::EXCEPTION, qualification);
        self.exit.interruption = self.event_info(event);
        self.exit.interruption_error = event.error.unwrap_or(0);
        Err(stop)
    }

    #[cold]
    fn exit_exception_svm(&mut self, event: &Event) -> Exec {
        if event.vector == vector::DB {
            self.side_effects(event); // DR6 and DR7 are what the handler would find; CR2 is not (APM vol. 2, 15.12.2 and 15.12.15)
        }
        let stop = self.exit_number(code::EXCEPTION.svm + u32::from(event.vector), event.error.unwrap_or(0).into());
        if event.vector == vector::PF {
            self.exit.info2 = event.payload;
        }
        Err(stop)
    }

    /// An event in the format of interruption information. SVM knows INT1, INT3 and INTO as exceptions only (APM vol. 2, 15.20).
    pub(super) fn event_info(&self, event: &Event) -> u32 {
        let kind = match event.kind {
            Kind::PrivilegedException | Kind::SoftwareException if self.model.is_amd() => Kind::Exception,
            kind => kind,
        };
        let error = if event.error.is_some() { HAS_ERROR } else { 0 };
        u32::from(event.vector) | (kind as u32) << 8 | error | VALID
    }
}

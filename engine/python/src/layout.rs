//! The control block's layout as numbers, so that a test can compare it with `softkvm.silicon.control`.

use std::collections::BTreeMap;
use std::mem::offset_of;

use pyo3::prelude::*;
use softkvm_engine::state::{DescriptorTable, Fpu, Segment, State};
use softkvm_engine::virt::control::{Access, Block, Control, Exit, VirtualApic};

/// Fields by name: offset and size in bytes.
type Fields = BTreeMap<String, (usize, usize)>;

/// Size of the field that `_get` names.
fn field_size<S, F>(_get: fn(&S) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! fields {
    ($out:ident, $name:literal, $structure:ty, $($field:ident)+) => {
        $($out.insert(
            format!("{}.{}", $name, stringify!($field)),
            (offset_of!($structure, $field), field_size(|s: &$structure| &s.$field)),
        );)+
    };
}

/// Every field of the control block's structures: "Structure.field" to its offset in the structure and its size, in bytes.
#[pyfunction]
pub fn control_layout() -> Fields {
    let mut out = Fields::new();
    fields!(out, "ControlBlock", Block, control access exit state msr_bitmap io_bitmap waivers apic);
    fields!(out, "VirtualApic", VirtualApic, irr isr eoi_exit icr tpr enable halts halt_cycles halt_waited);
    fields!(out, "Control", Control, intercepts exception_bitmap page_fault_error_mask page_fault_error_match cr_read cr_write dr_read
        dr_write tlb_control cr0_mask cr0_shadow cr4_mask cr4_shadow event event_error event_instruction_length vpid tsc_offset
        tsc_multiplier preemption_deadline emulate access_count instruction_budget pause_gap
        pause_window perf_controls waiver_count guest_perf_global_ctrl host_perf_global_ctrl virtual_tsc
        random tsc_rate next_rip virtual_lvtpc guest_status_mask guest_debugctl_mask halt_window);
    fields!(out, "Access", Access, gpa size write data);
    fields!(out, "Exit", Exit, reason instruction_length qualification info2 gpa gla interruption interruption_error vectoring
        vectoring_error next_rip instruction_info instruction_bytes_length instruction_bytes msr_index io_port io_size io_flags io_count
        io_gla access instructions tsc);
    fields!(out, "Segment", Segment, selector access_rights limit base);
    fields!(out, "DescriptorTable", DescriptorTable, base limit);
    fields!(out, "Fpu", Fpu, fcw fsw ftw fop fip fdp mxcsr pkru st vector mask);
    fields!(out, "State", State, gpr rip rflags segments gdtr idtr cr0 cr2 cr3 cr4 cr8 xcr0 xss efer star lstar cstar fmask
        kernel_gs_base sysenter_cs sysenter_esp sysenter_eip tsc_aux pat debugctl spec_ctrl dr dr6 dr7 pending_debug interruptibility
        activity pdpte fpu pkrs);
    out
}

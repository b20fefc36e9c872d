//! Posted-interrupt descriptors and the table that IPIs go by.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use softkvm_engine::virt::apic::{self, IpiTable as Table};

use crate::wakeup::Wakeup;

/// How any thread brings interrupts to one guest, wherever that is.
#[pyclass(frozen, module = "softkvm._engine")]
pub struct PostedInterrupts {
    pub descriptor: Arc<apic::PostedInterrupts>,
}

#[pymethods]
impl PostedInterrupts {
    /// Of the guest whose thread waits on `wakeup`.
    #[new]
    fn new(wakeup: &Wakeup) -> Self {
        let flag = wakeup.flag.clone();
        PostedInterrupts { descriptor: Arc::new(apic::PostedInterrupts::new(move || flag.set())) }
    }

    /// Brings the interrupt `vector` to the guest.
    fn post(&self, vector: u8) {
        self.descriptor.post(vector);
    }

    /// Takes what was posted: 32 bytes with a bit per vector, or None.
    fn take<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        let vectors = self.descriptor.take()?;
        let bytes: Vec<u8> = vectors.iter().flat_map(|word| word.to_le_bytes()).collect();
        Some(PyBytes::new(py, &bytes))
    }
}

/// Posted-interrupt descriptors of guests that send IPIs to each other, by APIC id.
#[pyclass(frozen, module = "softkvm._engine")]
pub struct IpiTable {
    pub table: Arc<Table>,
}

#[pymethods]
impl IpiTable {
    #[new]
    fn new() -> Self {
        IpiTable { table: Arc::default() }
    }

    /// Lets IPIs to `apic_id` go to `posted`; None lets them exit.
    #[pyo3(signature = (apic_id, posted))]
    fn set(&self, apic_id: u16, posted: Option<&PostedInterrupts>) {
        self.table.set(apic_id, posted.map(|posted| posted.descriptor.clone()));
    }
}

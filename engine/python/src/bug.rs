//! Bugs of the engine: a panic becomes the Python exception `EngineBug`, with its place in the source.

use std::cell::{Cell, RefCell};
use std::panic::{catch_unwind, set_hook, take_hook, AssertUnwindSafe};

use pyo3::create_exception;
use pyo3::exceptions::PyException;

create_exception!(softkvm._engine, EngineBug, PyException, "The engine failed; no guest and no caller can be the cause.");

thread_local! {
    /// The thread runs the engine, so the hook keeps its panic for `guard`.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
    static MESSAGE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Makes panics under [`guard`] silent; any other still goes to stderr.
pub fn install_hook() {
    let previous = take_hook();
    set_hook(Box::new(move |panic| {
        if GUARDED.get() {
            MESSAGE.set(panic.to_string());
        } else {
            previous(panic);
        }
    }));
}

/// Runs `work`; a panic comes back as its message and place.
pub fn guard<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    GUARDED.set(true);
    let outcome = catch_unwind(AssertUnwindSafe(work));
    GUARDED.set(false);
    outcome.map_err(|_| MESSAGE.take())
}

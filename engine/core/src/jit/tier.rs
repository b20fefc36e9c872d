//! Which code runs as host code, and which in the interpreter.

/// Runs of a block before [`Tier::Auto`] translates it.
const HOT: u32 = 32;

/// Which code runs as host code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Tier {
    Interpreter,
    /// Every block, from its first run on.
    Translator,
    /// Blocks that are hot.
    #[default]
    Auto,
}

impl Tier {
    /// Every tier with its name.
    pub const NAMES: [(&'static str, Tier); 3] =
        [("interpreter", Tier::Interpreter), ("translator", Tier::Translator), ("auto", Tier::Auto)];

    /// Runs of a block before it is translated; `None` for never.
    pub const fn threshold(self) -> Option<u32> {
        match self {
            Tier::Interpreter => None,
            Tier::Translator => Some(1),
            Tier::Auto => Some(HOT),
        }
    }
}

//! What host code does for those who watch branches: part of a block's key, so that code for one purpose only leads to code for the same.

/// A set of purposes. None means that nobody watches, or that only the interpreter can do what they want.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Watching(u8);

impl Watching {
    pub const NONE: Watching = Watching(0);
    /// Branches are only predicted, because mispredicted ones take cycles; together with `RECORD`, a filter decides.
    const BRANCHES: u8 = 1;
    const RECORD: u8 = 2;
    const TALLY: u8 = 4;
    const USER: u8 = 8;
    /// Bits of a context of the jump cache below the number.
    const CONTEXT_SHIFT: u32 = 5;

    /// Branches are watched, and counted by kind if `tally`, and recorded if there is a `filter` for it, which may let all through.
    pub fn branches(tally: bool, filter: Option<bool>) -> Self {
        let records = match filter {
            None => Self::BRANCHES,
            Some(false) => Self::RECORD,
            Some(true) => Self::BRANCHES | Self::RECORD,
        };
        Watching(records | if tally { Self::TALLY } else { 0 })
    }

    /// The same for code at privilege level `cpl`; host code for levels 1 and 2 is not made.
    #[inline(always)]
    pub fn at_level(self, cpl: u8) -> Self {
        match cpl {
            0 => self,
            3 if self != Self::NONE => Watching(self.0 | Self::USER),
            _ => Self::NONE,
        }
    }

    /// The purposes as a number of three bits.
    #[inline(always)]
    pub fn number(self) -> u8 {
        self.0 & !Self::USER
    }

    /// The number in its place in a context of the jump cache.
    #[inline(always)]
    pub fn in_context(self) -> u64 {
        u64::from(self.number()) << Self::CONTEXT_SHIFT
    }

    /// The number in a context of the jump cache.
    #[inline(always)]
    pub const fn number_in(context: u64) -> u8 {
        (context >> Self::CONTEXT_SHIFT & 7) as u8
    }

    /// Whether transfers are counted by kind.
    pub fn tallies(self) -> bool {
        self.0 & Self::TALLY != 0
    }

    /// Whether transfers are recorded.
    pub fn records(self) -> bool {
        self.0 & Self::RECORD != 0
    }

    /// Whether some transfers may be kept off the records.
    pub fn filters(self) -> bool {
        self.0 & Self::BRANCHES != 0
    }

    /// Whether the code is at privilege level 3.
    pub fn is_user(self) -> bool {
        self.0 & Self::USER != 0
    }
}

impl std::hash::Hash for Watching {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        state.write_u8(self.0);
    }
}

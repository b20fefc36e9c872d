pub fn handler(_: &iced_x86::Instruction) -> Option<crate::uop::Handler> {
    None
}

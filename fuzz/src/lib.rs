//! Properties of demae that must hold for any input. A workspace of its own: only fuzzing builds libFuzzer.

pub mod checks;

//! demae, held to what must be so for any bytes. A workspace of its own: only who fuzzes builds libFuzzer.

pub mod checks;

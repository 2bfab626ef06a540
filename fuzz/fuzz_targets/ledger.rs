#![no_main]
//! libFuzzer target for `checks::ledger`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| demae_fuzz::checks::ledger(data));

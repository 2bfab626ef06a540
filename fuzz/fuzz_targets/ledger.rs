#![no_main]
//! libFuzzer's way into `checks::ledger`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| demae_fuzz::checks::ledger(data));

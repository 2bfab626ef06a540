#![no_main]
//! libFuzzer target for `checks::spec`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| demae_fuzz::checks::spec(data));

#![no_main]
//! libFuzzer target for `checks::keys`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| demae_fuzz::checks::keys(data));

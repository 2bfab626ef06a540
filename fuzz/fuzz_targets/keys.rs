#![no_main]
//! libFuzzer's way into `checks::keys`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| demae_fuzz::checks::keys(data));

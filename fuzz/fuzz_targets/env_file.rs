#![no_main]
//! libFuzzer target for `checks::env_file`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| demae_fuzz::checks::env_file(data));

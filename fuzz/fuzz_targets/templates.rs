#![no_main]
//! libFuzzer target for `checks::templates`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| demae_fuzz::checks::templates(data));

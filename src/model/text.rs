//! Single values in Compose syntax: durations, sizes, command lines, numbers.

use std::time::Duration;

/// Longest accepted duration: a year. So sums, products and nanoseconds for Docker cannot overflow.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// `1m30s`, `500ms`, `2.5s`. Units: `us ms s m h`. Bare numbers are refused, as in Compose.
///
/// # Errors
/// One sentence that shows how to write it.
pub fn duration(text: &str) -> Result<Duration, String> {
    let error = || format!("`{text}` is not a duration; write it like `10s`, `1m30s` or `500ms`");
    let mut rest = text;
    let mut total = 0.0_f64;
    if rest.is_empty() {
        return Err(error());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(error)?;
        let number: f64 = rest[..digits].parse().map_err(|_| error())?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        let unit = match &rest[..letters] {
            "us" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(error()),
        };
        total += number * unit;
        rest = &rest[letters..];
    }
    match Duration::try_from_secs_f64(total) {
        Ok(found) if found <= LONGEST => Ok(found),
        _ => Err(format!("`{text}` is too long; a year, `8760h`, is the most")),
    }
}

/// `512M`, `64k`, `1.5gb`, `1024`: 1024-based, as Docker and Compose read them. In bytes.
///
/// # Errors
/// One sentence that shows how to write it.
pub fn size(text: &str) -> Result<u64, String> {
    let error = || format!("`{text}` is not a size; write it like `512M`, `64k` or `2G` (1024-based)");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..digits].parse().map_err(|_| error())?;
    let factor = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1024.0,
        "m" | "mb" => 1024.0 * 1024.0,
        "g" | "gb" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err(error()),
    };
    let bytes = number * factor;
    if !(0.0..=9.0e15).contains(&bytes) {
        return Err(error());
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be in range just above")]
    Ok(bytes as u64)
}

/// Splits a command line by the rules of a POSIX shell's words: blanks, quotes and backslashes, no expansion.
///
/// # Errors
/// If a quote is not closed, or a backslash ends the text.
pub fn words(text: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            ' ' | '\t' | '\n' => words.extend(word.take()),
            '\'' | '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next() {
                        None => return Err(format!("a quote ({c}) is not closed")),
                        Some(end) if end == c => break,
                        Some('\\') if c == '"' => match chars.next() {
                            Some(e @ ('"' | '\\' | '$' | '`')) => word.push(e),
                            Some(e) => word.extend(['\\', e]),
                            None => return Err("a backslash ends the command".into()),
                        },
                        Some(inner) => word.push(inner),
                    }
                }
            }
            '\\' => match chars.next() {
                Some(next) => word.get_or_insert_default().push(next),
                None => return Err("a backslash ends the command".into()),
            },
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    Ok(words)
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A value as JSON.
///
/// # Panics
/// If it holds a map whose keys are not strings: a bug in the type.
pub fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("values of this crate can be written as JSON")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_parse_as_in_compose() {
        let ms = |t: &str| duration(t).map(|d| d.as_millis());
        assert_eq!(ms("1m30s"), Ok(90_000));
        assert_eq!(ms("20ms"), Ok(20));
        assert_eq!(ms("2.5s"), Ok(2500));
        assert_eq!(ms("500us"), Ok(0));
        for bad in ["", "10", "s", "1x", "1M", "-1s", "1s x", "8761h", "5000000000000000h"] {
            assert!(duration(bad).is_err(), "{bad:?} was accepted as a duration");
        }
    }

    #[test]
    fn sizes_parse_as_in_docker() {
        assert_eq!(size("64M"), Ok(67_108_864));
        assert_eq!(size("512mb"), Ok(536_870_912));
        assert_eq!(size("1.5k"), Ok(1536));
        assert_eq!(size("10"), Ok(10));
        for bad in ["", "M", "1T", "1e3", "-1", "9999999999G"] {
            assert!(size(bad).is_err(), "{bad:?} was accepted as a size");
        }
    }

    #[test]
    fn commands_split_like_a_shell() {
        assert_eq!(
            words("a 'b c' \"d \\\" e\" f\\ g"),
            Ok(vec!["a".into(), "b c".into(), "d \" e".into(), "f g".into()])
        );
        assert_eq!(words("x ''"), Ok(vec!["x".into(), String::new()]));
        assert!(words("a 'b").is_err());
    }
}

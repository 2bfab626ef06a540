//! Files that are named on the command line; `-` is standard input.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, stdin},
    path::Path,
};

use super::Failed;
use crate::model::{
    dotenv::{self, Format},
    name::EnvName,
};

/// Most bytes that are read from standard input: as of a request that etcd takes.
const MOST: u64 = 1 << 20;

/// The bytes of a file, or of standard input.
pub(super) fn read_file_or_stdin(file: &Path) -> Result<Vec<u8>, Failed> {
    let mut text = Vec::new();
    let read = match file.as_os_str().to_str() {
        Some("-") => stdin().take(MOST + 1).read_to_end(&mut text).and_then(|read| match read as u64 > MOST {
            true => Err(std::io::Error::other(format!("it has more than {MOST} bytes"))),
            false => Ok(text),
        }),
        _ => fs::read(file),
    };
    read.map_err(|e| Failed::because(format!("cannot read `{}`: {e}", file.display())))
}

/// The variables of a file. No value is in the message of an error.
pub(super) fn read_variables(file: &Path, format: Format) -> Result<BTreeMap<EnvName, String>, Failed> {
    let name = file.display();
    let text = String::from_utf8(read_file_or_stdin(file)?)
        .map_err(|e| Failed::because(format!("`{name}` is not UTF-8 at byte {}", e.utf8_error().valid_up_to())))?;
    let values = dotenv::parse(&text, format).map_err(|problems| {
        let lines: Vec<String> = problems.iter().map(|(line, what)| format!("{name}:{line}: {what}")).collect();
        Failed::because(format!("nothing was written:\n{}", lines.join("\n")))
    })?;
    if values.is_empty() {
        return Err(Failed::because(format!("`{name}` has no variables")));
    }
    Ok(values)
}

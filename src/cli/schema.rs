//! `demae schema`

use super::{Ended, Exit, print::Printer};
use crate::model::spec::SCHEMA;

pub(super) fn run(printer: &mut Printer) -> Ended {
    printer.line(SCHEMA.trim_end());
    Ok(Exit::Success)
}

//! Effects on this machine. Each part has one home: containers in `docker`, nginx in `nginx`, everything written to
//! disk in `files`.

pub mod certificate;
pub mod clock;
pub mod docker;
pub mod drain;
pub mod files;
pub mod health;
pub mod layout;
pub mod nginx;
pub mod ports;
pub mod probe;
pub mod tls;

//! Effects on this machine. Each kind has one home: containers in `docker`, nginx in `nginx`, all disk writes in
//! `files`.

pub mod archive;
pub mod certificate;
pub mod clock;
pub mod docker;
pub mod drain;
pub mod files;
pub mod health;
pub mod images;
pub mod layout;
pub mod nginx;
pub mod policy;
pub mod ports;
pub mod probe;
pub mod registry;
pub mod takeover;
pub mod tcp_routes;
pub mod tls;

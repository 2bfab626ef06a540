//! Everything that runs on real etcd, nginx and Docker: one binary, so that the support code is compiled once.

#[path = "../support/mod.rs"]
mod support;

mod acceptance;
mod answers;
mod app_verbs;
mod archives;
mod benchmarks;
mod bounds;
mod builds;
mod container;
mod container_faults;
#[cfg(feature = "failpoints")]
mod crash;
mod dashboards;
mod dev;
mod digests;
mod disk;
mod docker_faults;
mod doctor;
mod engine_restarts;
mod etcd_faults;
mod etcd_tls;
mod events;
mod faults;
mod fleet_verbs;
mod footprint;
mod health;
mod identity;
mod images;
mod imports;
mod kinds;
mod logins;
mod many;
mod names;
mod nginx_faults;
mod ordinary;
#[cfg(feature = "otel")]
mod otel;
mod policy;
mod registry_answers;
mod restores;
mod retries;
mod roles;
mod rollouts;
mod secrets;
mod slow_disk;
mod standstill;
mod store;
mod store_trust;
mod switches;
mod takeover;
mod tasks;
mod tcp_routes;
mod templates;
mod upgrade;
mod verbs;

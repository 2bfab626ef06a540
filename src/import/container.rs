//! A container that exists, as a service: what Docker says of it, without what its image says already.

use serde_json::Value as Json;

use super::{
    ImportError,
    compose::{Options, Outcome},
    list, map,
    run_line::alone,
    scalar,
};
use crate::model::yaml::Node;

/// Makes an app of a container, by what `docker inspect` prints of it and of its image.
///
/// # Errors
/// If it has no name that an app can have.
pub fn container(container: &Json, image: &Json, options: &Options<'_>) -> Result<Outcome, ImportError> {
    let name = container["Name"].as_str().unwrap_or_default().trim_start_matches('/');
    alone(name, service(container, image), options)
}

fn service(container: &Json, image: &Json) -> Node {
    let (own, base, host) = (&container["Config"], &image["Config"], &container["HostConfig"]);
    let mut out: Vec<(&str, Node)> = vec![("image", scalar(own["Image"].as_str().unwrap_or_default()))];
    for (key, name) in [("entrypoint", "Entrypoint"), ("command", "Cmd")] {
        if own[name] != base[name] {
            out.extend(texts(&own[name]).map(|all| (key, all)));
        }
    }
    for (key, name) in [("user", "User"), ("working_dir", "WorkingDir"), ("stop_signal", "StopSignal")] {
        if own[name] != base[name] {
            out.extend(text(&own[name]).map(|found| (key, found)));
        }
    }
    // Docker gives a container without one the beginning of its id.
    let id = container["Id"].as_str().unwrap_or_default();
    if own["Hostname"].as_str().is_some_and(|name| !name.is_empty() && !id.starts_with(name)) {
        out.extend(text(&own["Hostname"]).map(|found| ("hostname", found)));
    }
    let env = difference(&own["Env"], &base["Env"]);
    if !env.is_empty() {
        out.push(("environment", list(env.into_iter().map(scalar).collect())));
    }
    let labels = own["Labels"].as_object().into_iter().flatten().filter(|(name, value)| {
        base["Labels"][name.as_str()] != **value && !name.starts_with("com.docker.") && !name.starts_with("demae.")
    });
    let labels: Vec<(String, Node)> =
        labels.map(|(name, value)| (name.clone(), scalar(value.as_str().unwrap_or_default()))).collect();
    if !labels.is_empty() {
        out.push(("labels", map(labels)));
    }
    out.extend(ports(host));
    out.extend(volumes(container, base));
    out.extend(health(&own["Healthcheck"], &base["Healthcheck"]));
    match host["NetworkMode"].as_str() {
        None | Some("default" | "bridge" | "") => {}
        // Compose's own network of a project.
        Some(network) if own["Labels"]["com.docker.compose.project"].is_string() && network.ends_with("_default") => {}
        Some(network) => out.push(("network_mode", scalar(network))),
    }
    for (key, name) in [
        ("cap_add", "CapAdd"),
        ("cap_drop", "CapDrop"),
        ("dns", "Dns"),
        ("extra_hosts", "ExtraHosts"),
        ("group_add", "GroupAdd"),
        ("security_opt", "SecurityOpt"),
        ("volumes_from", "VolumesFrom"),
    ] {
        out.extend(texts(&host[name]).map(|all| (key, all)));
    }
    for (key, name) in [("privileged", "Privileged"), ("read_only", "ReadonlyRootfs"), ("init", "Init")] {
        if host[name] == true {
            out.push((key, scalar("true")));
        }
    }
    let tmpfs: Vec<Node> =
        host["Tmpfs"].as_object().into_iter().flatten().map(|(path, _)| scalar(path.as_str())).collect();
    if !tmpfs.is_empty() {
        out.push(("tmpfs", list(tmpfs)));
    }
    if host["IpcMode"].as_str().is_some_and(|mode| !matches!(mode, "" | "private" | "shareable")) {
        out.extend(text(&host["IpcMode"]).map(|found| ("ipc", found)));
    }
    if host["Runtime"].as_str().is_some_and(|runtime| !matches!(runtime, "" | "runc")) {
        out.extend(text(&host["Runtime"]).map(|found| ("runtime", found)));
    }
    let sysctls = host["Sysctls"].as_object().into_iter().flatten();
    let sysctls: Vec<(String, Node)> =
        sysctls.map(|(name, value)| (name.clone(), scalar(value.as_str().unwrap_or_default()))).collect();
    if !sysctls.is_empty() {
        out.push(("sysctls", map(sysctls)));
    }
    for (key, name) in [("gpus", "DeviceRequests"), ("links", "Links")] {
        let is_given = host[name].as_object().is_some_and(|all| !all.is_empty())
            || host[name].as_array().is_some_and(|all| !all.is_empty());
        if is_given {
            out.push((key, list(vec![scalar(name)])));
        }
    }
    for (key, name) in [("pid", "PidMode"), ("userns_mode", "UsernsMode"), ("uts", "UTSMode")] {
        out.extend(text(&host[name]).map(|found| (key, found)));
    }
    let part = |device: &Json, name: &str| device[name].as_str().unwrap_or_default().to_owned();
    let devices = host["Devices"].as_array().into_iter().flatten().map(|device| {
        let parts = ["PathOnHost", "PathInContainer", "CgroupPermissions"].map(|name| part(device, name));
        scalar(parts.join(":"))
    });
    let devices: Vec<Node> = devices.collect();
    if !devices.is_empty() {
        out.push(("devices", list(devices)));
    }
    // 64 MiB is the engine's own.
    for (key, name, usual) in
        [("mem_limit", "Memory", 0), ("shm_size", "ShmSize", 67_108_864), ("pids_limit", "PidsLimit", 0)]
    {
        let number = host[name].as_i64().filter(|number| *number > 0 && *number != usual);
        out.extend(number.map(|number| (key, scalar(number.to_string()))));
    }
    if let Some(nano) = host["NanoCpus"].as_i64().filter(|nano| *nano > 0) {
        out.push(("cpus", scalar(format!("{}.{:03}", nano / 1_000_000_000, nano % 1_000_000_000 / 1_000_000))));
    }
    let limits = host["Ulimits"].as_array().into_iter().flatten().filter_map(|limit| {
        let number = |name: &str| limit[name].as_i64().map(|number| scalar(number.to_string()));
        Some((limit["Name"].as_str()?.to_owned(), map([("soft", number("Soft")?), ("hard", number("Hard")?)])))
    });
    let limits: Vec<(String, Node)> = limits.collect();
    if !limits.is_empty() {
        out.push(("ulimits", map(limits)));
    }
    let driver = host["LogConfig"]["Type"].as_str().unwrap_or("json-file");
    let log_options: Vec<(String, Node)> = host["LogConfig"]["Config"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, value)| (name.clone(), scalar(value.as_str().unwrap_or_default())))
        .collect();
    if driver != "json-file" || !log_options.is_empty() {
        out.push(("logging", map([("driver", scalar(driver)), ("options", map(log_options))])));
    }
    match host["RestartPolicy"]["Name"].as_str() {
        None | Some("" | "no") => {}
        Some(policy) => out.push(("restart", scalar(policy))),
    }
    if let Some(seconds) = own["StopTimeout"].as_i64() {
        out.push(("stop_grace_period", scalar(format!("{seconds}s"))));
    }
    map(out)
}

fn text(value: &Json) -> Option<Node> {
    value.as_str().filter(|text| !text.is_empty()).map(scalar)
}

fn texts(value: &Json) -> Option<Node> {
    let all: Vec<Node> = value.as_array()?.iter().filter_map(Json::as_str).map(scalar).collect();
    (!all.is_empty()).then(|| list(all))
}

/// What is in a list and not in that of the image.
fn difference(own: &Json, base: &Json) -> Vec<String> {
    let base: Vec<&str> = base.as_array().into_iter().flatten().filter_map(Json::as_str).collect();
    let own = own.as_array().into_iter().flatten().filter_map(Json::as_str);
    own.filter(|text| !base.contains(text)).map(str::to_owned).collect()
}

/// The published ports.
fn ports(host: &Json) -> Option<(&'static str, Node)> {
    let mut out = Vec::new();
    for (port, bindings) in host["PortBindings"].as_object()? {
        for binding in bindings.as_array().into_iter().flatten() {
            let published = binding["HostPort"].as_str().unwrap_or_default();
            out.push(scalar(format!("{published}:{port}")));
        }
    }
    (!out.is_empty()).then(|| ("ports", list(out)))
}

/// The mounts; volumes that only the image asks for have no name that says anything.
fn volumes(container: &Json, base: &Json) -> Option<(&'static str, Node)> {
    let mut out = Vec::new();
    for mount in container["Mounts"].as_array()? {
        let target = mount["Destination"].as_str().unwrap_or_default();
        let source = match mount["Type"].as_str() {
            Some("volume") => mount["Name"].as_str(),
            Some("tmpfs") => continue,
            _ => mount["Source"].as_str(),
        };
        let source = source.unwrap_or_default();
        let is_nameless = source.len() == 64 && source.bytes().all(|b| b.is_ascii_hexdigit());
        if is_nameless && base["Volumes"].get(target).is_some() {
            continue;
        }
        let mode = if mount["RW"] == false { ":ro" } else { "" };
        out.push(scalar(format!("{source}:{target}{mode}")));
    }
    (!out.is_empty()).then(|| ("volumes", list(out)))
}

fn health(own: &Json, base: &Json) -> Option<(&'static str, Node)> {
    if own == base {
        return None;
    }
    let mut out: Vec<(&str, Node)> = vec![("test", texts(&own["Test"])?)];
    for (key, name) in [("interval", "Interval"), ("timeout", "Timeout"), ("start_period", "StartPeriod")] {
        if let Some(nanos) = own[name].as_i64().filter(|nanos| *nanos > 0) {
            out.push((key, scalar(format!("{}ms", nanos / 1_000_000))));
        }
    }
    if let Some(retries) = own["Retries"].as_i64().filter(|retries| *retries > 0) {
        out.push(("retries", scalar(retries.to_string())));
    }
    Some(("healthcheck", map(out)))
}

//! nginx in a container of its own: tested, reloaded and counted through Docker.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

use std::{fs, path::Path, process::Command, time::Duration};

use crate::support::{
    lab::{Lab, Setup},
    load::{Load, mixed},
    names::free_address,
    process::docker,
    wait::until,
};

/// An image FROM scratch with this machine's nginx and the libraries it loads.
fn nginx_image(name: &str, dir: &Path) {
    let binary =
        ["/usr/sbin/nginx", "/usr/bin/nginx"].into_iter().find(|p| Path::new(p).exists()).expect("nginx is installed");
    let output = Command::new("ldd").arg(binary).output().expect("ldd runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let libraries = text.split_whitespace().filter(|w| w.starts_with('/'));
    let root = dir.join("root");
    for file in libraries.chain([binary, "/etc/passwd", "/etc/group"]) {
        let to = root.join(file.trim_start_matches('/'));
        fs::create_dir_all(to.parent().expect("a parent")).expect("a directory");
        fs::copy(file, to).expect("copied");
    }
    for empty in ["tmp", "etc/nginx", "var/log/nginx", "run"] {
        fs::create_dir_all(root.join(empty)).expect("a directory");
    }
    // Debian's nginx is compiled with more paths than it has to create.
    fs::create_dir_all(root.join("var/lib/nginx")).expect("a directory");
    let text = format!(
        "FROM scratch\nCOPY root /\nENTRYPOINT [\"{binary}\", \"-e\", \"/run/error.log\", \"-g\", \"daemon off;\"]\n"
    );
    fs::write(dir.join("Dockerfile"), text).expect("a file");
    crate::support::images::build_from(name, dir);
}

struct Contained {
    name: String,
    image: String,
}

impl Drop for Contained {
    fn drop(&mut self) {
        docker(&["rm", "-fv", &self.name]);
        docker(&["rmi", "-f", &self.image]);
    }
}

#[test]
fn an_nginx_in_a_container_switches_and_reloads_without_loss() {
    // Only root can see another process's file system and network.
    let is_root = fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0);
    assert!(is_root, "an nginx in a container needs an agent that is root, and so does its test");
    let address = free_address();
    let tag = crate::support::names::random();
    let name = format!("demae-nginx-{tag}");
    // With two settings of one key the config reader takes neither, so the lab's own address stays and is unused.
    let mut lab = Lab::with(&Setup { no_agent: true, nginx: &format!("container = \"{name}\""), ..Setup::default() });
    let file = lab.path("agent.toml");
    let text = fs::read_to_string(&file).expect("a file");
    let text = text
        .replace(&format!("conf = \"{}\"", lab.path("nginx.conf").display()), "conf = \"/etc/nginx/nginx.conf\"")
        .replace(&format!("address = \"{}\"", lab.ingress), &format!("address = \"{address}\""))
        .replace(&format!("listen = [\"{}\"]", lab.ingress), "listen = [\"80\"]");
    fs::write(&file, text).expect("a file");

    let state = lab.path("state");
    fs::create_dir_all(&state).expect("a directory");
    let conf = lab.path("contained.conf");
    let text = format!(
        "user root;\nworker_processes 2;\npid /run/nginx.pid;\nerror_log /run/error.log;\nevents {{ }}\nhttp {{ access_log off; keepalive_requests 100000;\n\
         include {}/nginx/live/*.conf;\nserver {{ listen 80; server_name starting.invalid; return 503; }} }}\n",
        state.display()
    );
    fs::write(&conf, text).expect("a file");
    let contained = Contained { name: name.clone(), image: format!("demae-lab-nginx:{tag}") };
    nginx_image(&contained.image, &lab.path("nginx-image"));
    docker(&[
        "run",
        "-d",
        "--name",
        &name,
        "-p",
        &format!("{address}:80"),
        "-v",
        &format!("{0}:{0}", state.display()),
        "-v",
        &format!("{}:/etc/nginx/nginx.conf:ro", conf.display()),
        &contained.image,
    ]);
    until("nginx answers", || {
        crate::support::load::get(address, "starting.invalid", "/").is_ok_and(|(code, _)| code == 503)
    });
    lab.ingress = address;
    lab.start_agent(&[]);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(address, "web.test", mixed(Duration::from_millis(5)));
    until("requests are served", || load.requests() > 50);
    lab.deploy("web", "apps/web/image", &lab.image("v2"));
    lab.deploy("web", "apps/web/image", &lab.image("v1"));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    assert_eq!(lab.metric("demae_drains_total", "cut"), 0.0, "connections were counted in nginx's own namespace");
}

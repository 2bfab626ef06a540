//! Images in files: each form that they come in, and each way in which they are wrong. What serves is never touched, and no
//! image of others loses its name.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use demae::model::{
    name::ImageRef,
    status::{AppStatus, State},
};
use sha2::{Digest as _, Sha256};

use crate::support::{
    disk::Disk,
    files, images,
    lab::{Lab, Setup},
    load::{self, Load},
    process::{docker, run},
    server::{Answer, Server},
};

fn sum(path: &Path) -> String {
    Sha256::digest(fs::read(path).expect("a file")).iter().map(|b| format!("{b:02x}")).collect()
}

/// The name that an image from an archive has in the engine.
fn loaded_as(image: &str) -> String {
    ImageRef::try_from(image).expect("an image").tagged()
}

/// A policy by which archives may come from the directory of the lab, and from addresses.
fn allowing(lab: &Lab) -> String {
    format!("[images]\narchives = ['{}*', 'http://*', 'copy://*', 's3://*']\n", lab.dir.path().display())
}

/// Writes what `docker save` writes of these images.
fn save(lab: &Lab, name: &str, images: &[&str]) -> PathBuf {
    let path = lab.path(name);
    run(Command::new("docker").args(["save", "-o"]).arg(&path).args(images));
    path
}

fn image_exists(name: &str) -> bool {
    Command::new("docker").args(["image", "inspect", name]).output().expect("docker runs").status.success()
}

/// Turns a saved file into a layout by OCI, with an index for several platforms around it.
fn layout(lab: &Lab, saved: &Path, name: &str) -> PathBuf {
    let dir = lab.path(&format!("{name}-dir"));
    fs::create_dir_all(dir.join("blobs/sha256")).expect("a directory");
    run(Command::new("tar").arg("-xf").arg(saved).arg("-C").arg(&dir));
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.join("manifest.json")).expect("a file")).expect("JSON");
    let keep = |bytes: &[u8], kind: &str| {
        let digest: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
        fs::write(dir.join("blobs/sha256").join(&digest), bytes).expect("a file");
        let media_type = format!("application/vnd.oci.image.{kind}");
        serde_json::json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len() })
    };
    let file = |name: &serde_json::Value| fs::read(dir.join(name.as_str().expect("a name"))).expect("a file");
    let layers: Vec<serde_json::Value> = manifest[0]["Layers"]
        .as_array()
        .expect("layers")
        .iter()
        .map(|layer| {
            let level = ruzstd::encoding::CompressionLevel::Fastest;
            keep(&ruzstd::encoding::compress_to_vec(file(layer).as_slice(), level), "layer.v1.tar+zstd")
        })
        .collect();
    let config = keep(&file(&manifest[0]["Config"]), "config.v1+json");
    let image = serde_json::json!({ "schemaVersion": 2, "config": config, "layers": layers }).to_string();
    let mut image = keep(image.as_bytes(), "manifest.v1+json");
    image["platform"] = serde_json::json!({ "os": "linux", "architecture": "amd64" });
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [image] }).to_string();
    let mut index = keep(index.as_bytes(), "index.v1+json");
    index["annotations"] = serde_json::json!({ "org.opencontainers.image.ref.name": "v1" });
    fs::write(dir.join("index.json"), serde_json::json!({ "manifests": [index] }).to_string()).expect("a file");
    fs::write(dir.join("oci-layout"), "{\"imageLayoutVersion\": \"1.0.0\"}").expect("a file");
    let path = lab.path(name);
    run(Command::new("tar").arg("-C").arg(&dir).arg("-cf").arg(&path).args(["oci-layout", "index.json", "blobs"]));
    path
}

/// A server of the files of a directory. `/moved/…` leads to `/…`, `/busy/…` answers 503.
fn files_of(dir: PathBuf) -> Server {
    Server::start(move |path| {
        match (path.strip_prefix("moved/"), path.strip_prefix("busy/"), fs::read(dir.join(path))) {
            (Some(to), ..) => Answer::new("302 Found", format!("location: /{to}\r\n"), ""),
            (_, Some(_), _) => Answer::new("503 Service Unavailable", "", ""),
            (.., Ok(bytes)) => Answer::new("200 OK", "", bytes),
            (.., Err(_)) => Answer::new("404 Not Found", "", ""),
        }
    })
}

#[test]
fn images_from_archives_of_each_form_are_deployed_without_a_lost_request() {
    let lab = Lab::with(&Setup {
        sections: "[fetch]\nvault = ['/bin/cp', '/nowhere/{url}', '{file}']\ncopy = ['/bin/sh', '-c', 'cp \"/${1#copy://}\" \"$2\"', 'sh', '{url}', '{file}']\n",
        ..Setup::default()
    });
    files::write(&lab.path("policy.toml"), &allowing(&lab));
    let versions: Vec<String> = (1..=8).map(|n| format!("v{n}")).collect();
    let names: Vec<String> = versions.iter().map(|version| lab.own_image(version)).collect();
    let id = docker(&["image", "inspect", "--format", "{{.Id}}", &names[1]]);
    let tagged = save(&lab, "tagged.tar", &[&names[0]]);
    let by_id = save(&lab, "by-id.tar", &[&id]);
    let both = save(&lab, "both.tar", &[&names[2], &names[3]]);
    let gzip = save(&lab, "gzip.tar", &[&names[4]]);
    run(Command::new("gzip").arg("-1").arg(&gzip));
    let gzip = lab.path("gzip.tar.gz");
    let zstd = lab.path("zstd.tar.zst");
    let plain = fs::read(save(&lab, "plain.tar", &[&names[5]])).expect("a file");
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    fs::write(&zstd, ruzstd::encoding::compress_to_vec(plain.as_slice(), level)).expect("a file");
    let oci = layout(&lab, &save(&lab, "seven.tar", &[&names[6]]), "oci.tar");
    let fetched = save(&lab, "eight.tar", &[&names[7]]);
    for name in &names {
        docker(&["rmi", name]);
    }
    let server = files_of(lab.dir.path().to_owned());
    let url = |path: &Path, prefix: &str| {
        let name = path.file_name().expect("a name").to_string_lossy();
        format!("http://{}/{prefix}{name}@sha256:{}", server.address, sum(path))
    };
    let sources = [
        ("v1", format!("docker-archive:{}", tagged.display())),
        ("v2", format!("docker-archive:{}@sha256:{}", by_id.display(), sum(&by_id))),
        ("v3", format!("docker-archive:{}#{}", both.display(), names[2])),
        ("v4", format!("docker-archive:{}#{}", both.display(), names[3])),
        ("v5", format!("docker-archive:{}", url(&gzip, ""))),
        ("v6", format!("docker-archive:{}", url(&zstd, "moved/"))),
        ("v7", format!("oci-archive:{}", url(&oci, ""))),
        ("v8", format!("docker-archive:copy://{}@sha256:{}", &fetched.display().to_string()[1..], sum(&fetched))),
    ];
    for (_, source) in &sources {
        lab.remove_on_drop(loaded_as(source));
    }
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&sources[0].1, "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", load::mixed(Duration::from_millis(2)));
    for (version, source) in &sources[1..] {
        lab.deploy("web", "apps/web/image", source);
        let (_, body) = lab.get("web.test", "/").expect("an answer");
        assert!(body.contains(&format!("version={version}")), "{source}: {body}");
    }
    // The same file once more, and back to the first one: nothing is loaded twice under two names.
    lab.deploy("web", "apps/web/restart", "1");
    lab.deploy("web", "apps/web/image", &sources[0].1);
    assert_eq!(load.stop().failed, 0);
    assert!(names.iter().all(|name| !image_exists(name)), "names in an archive are not given");
    assert!(!lab.path("state/spool").exists(), "nothing is left of the files");
    let (code, out, _) = lab.ask(&["images"]);
    assert!(code == 0 && out.contains("demae.local/archive:"), "{out}");
}

fn is_stuck(app: &AppStatus) -> bool {
    app.reason.contains("cannot be pulled")
}

#[test]
fn archives_that_are_wrong_change_nothing() {
    let lab = Lab::new();
    let serving = lab.own_image("v1");
    files::write(&lab.path("policy.toml"), &allowing(&lab));
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&serving, "web.test", ""));
    let before = docker(&["image", "inspect", "--format", "{{.Id}}", &serving]);
    // A file whose image has the name of the one that serves.
    images::build(&format!("{serving}-other"), "stolen", &lab.path("other"));
    lab.remove_on_drop(format!("{serving}-other"));
    let thief = {
        docker(&["tag", &serving, "demae-kept-aside:v1"]);
        docker(&["tag", &format!("{serving}-other"), &serving]);
        let path = save(&lab, "thief.tar", &[&serving]);
        docker(&["tag", "demae-kept-aside:v1", &serving]);
        docker(&["rmi", "demae-kept-aside:v1"]);
        path
    };
    let whole = fs::read(&thief).expect("a file");
    fs::write(lab.path("cut.tar"), &whole[..whole.len() / 2]).expect("a file");
    fs::write(lab.path("text.tar"), "root:x:0:0").expect("a file");
    run(Command::new("mkfifo").arg(lab.path("pipe")));
    std::os::unix::fs::symlink("/etc/passwd", lab.path("link.tar")).expect("a link");
    let both = save(&lab, "both.tar", &[&serving, &format!("{serving}-other")]);
    let foreign = lab.path("foreign");
    fs::create_dir(&foreign).expect("a directory");
    run(Command::new("tar").arg("-xf").arg(&thief).arg("-C").arg(&foreign));
    for file in fs::read_dir(&foreign).expect("a directory").map(|file| file.expect("a file").path()) {
        if file.extension().is_some_and(|end| end == "json") {
            let text = fs::read_to_string(&file).expect("text").replace("\"amd64\"", "\"s390x\"");
            fs::write(&file, text).expect("a file");
        }
    }
    run(Command::new("tar").arg("-C").arg(&foreign).arg("-cf").arg(lab.path("foreign.tar")).arg("."));
    let server = files_of(lab.dir.path().to_owned());
    let (dir, zeros) = (lab.dir.path().display(), "0".repeat(64));
    let load = Load::start(lab.ingress, "web.test", load::mixed(Duration::from_millis(2)));
    let http = format!("docker-archive:http://{}", server.address);
    // A file is that of this host, and a person mends it; what an address leads to is the same for all hosts.
    let (here, failed, later) = ("image_missing", "halted", "image");
    for (source, part, kind) in [
        (format!("docker-archive:{dir}/cut.tar"), "cut off", here),
        (format!("docker-archive:{dir}/text.tar"), "no tar file", here),
        (format!("docker-archive:{dir}/none.tar"), "there is no `", here),
        (format!("docker-archive:{dir}"), "is not a file", here),
        (format!("docker-archive:{dir}/pipe"), "is not a file", here),
        (format!("docker-archive:{}@sha256:{zeros}", thief.display()), "its SHA-256 is ", here),
        (format!("docker-archive:{dir}/link.tar"), "leads to another place", here),
        (format!("docker-archive:{}", both.display()), "2 images are in it; write which one after a `#`", here),
        (format!("docker-archive:{}#none", both.display()), "no image in it is named `none`", here),
        (format!("oci-archive:{}", thief.display()), "it is a `docker-archive`", here),
        (format!("docker-archive:{dir}/foreign.tar"), "it is for linux/s390x, and this host is linux/amd64", here),
        (format!("{http}/none.tar@sha256:{zeros}"), "404", failed),
        (format!("{http}/busy/x.tar@sha256:{zeros}"), "503", later),
        (format!("{http}/thief.tar@sha256:{zeros}"), "its SHA-256 is ", failed),
        (
            format!("{http}/foreign.tar@sha256:{}", sum(&lab.path("foreign.tar"))),
            "it is for linux/s390x, and this host is linux/amd64",
            failed,
        ),
        (format!("docker-archive:s3://bucket/web.tar@sha256:{zeros}"), "`[fetch]` in the agent's file", later),
    ] {
        lab.put("apps/web/image", &source);
        let is_refused = |s: &AppStatus| s.is(kind) && is_stuck(s) && s.reason.contains(part);
        let app = lab.wait_app("web", &format!("refused: {part}"), is_refused);
        assert!(app.healthy > 0 && !app.reason.contains("root:x"), "{}", app.reason);
        assert_eq!((app.state == State::Blocked, app.verdict.is_some()), (kind != later, kind == failed), "{app:?}");
    }
    // Without a rule no file of the host is read but those that apps may mount.
    lab.put("apps/web/image", "docker-archive:/etc/shadow");
    lab.wait_app("web", "not allowed", |s| s.is("not_allowed") && s.reason.contains("from the archive `/etc/shadow`"));
    // The name of the image that serves stays where it is.
    let source = format!("docker-archive:{}", thief.display());
    lab.remove_on_drop(loaded_as(&source));
    lab.deploy("web", "apps/web/image", &source);
    assert!(lab.get("web.test", "/").is_ok_and(|(_, body)| body.contains("version=stolen")));
    assert_eq!(docker(&["image", "inspect", "--format", "{{.Id}}", &serving]), before);
    lab.deploy("web", "apps/web/image", &serving);
    let tally = load.stop();
    assert_eq!(tally.failed, 0, "{:#?}", tally.reasons);
    assert!(!lab.path("state/spool").exists(), "nothing is left of the files");
}

#[test]
fn an_archive_that_does_not_fit_is_refused_before_it_is_unpacked() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    let _state = Disk::of(lab.path("state"), "24m");
    files::write(&lab.path("policy.toml"), &allowing(&lab));
    lab.start_agent(&[]);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let large = format!("demae-lab-{}-large:v2", lab.tag);
    images::build_large(&large, "v2", &lab.path("large"), 16 << 20);
    let large_file = save(&lab, "large.tar", &[&large]);
    let small = lab.own_image("v3");
    let small_file = save(&lab, "small.tar", &[&small]);
    docker(&["rmi", &large, &small]);
    lab.put("apps/web/image", &format!("docker-archive:{}", large_file.display()));
    let app = lab.wait_app("web", "refused", |s| s.is("disk_full"));
    assert!(app.healthy > 0 && app.reason.contains("no space left on device for it"), "{}", app.reason);
    assert!(!lab.path("state/spool").exists(), "nothing of it is left on the disk");
    let source = format!("docker-archive:{}", small_file.display());
    lab.remove_on_drop(loaded_as(&source));
    lab.deploy("web", "apps/web/image", &source);
    assert!(lab.get("web.test", "/").is_ok_and(|(_, body)| body.contains("version=v3")));
    // The agent must not see that the disk goes.
    lab.kill_agent();
}

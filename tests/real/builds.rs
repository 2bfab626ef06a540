//! The scripts of the guide about builds: from a commit to a deploy, by a registry and by a file, with the rights of CI.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use crate::{
    roles::{lab_with_roles, with_user},
    support::{
        files, images,
        lab::Lab,
        names::free_address,
        process::{docker, run},
        registry::Registry,
        server::{Answer, Server},
        wait::until,
    },
};
use demae::model::{name::ImageRef, status::State};

fn script(name: &str) -> String {
    format!("{}/deploy/examples/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

/// Commits a Dockerfile whose app says that it is this version.
fn commit(repository: &Path, version: &str) {
    // Its version comes first: builds of other versions, by tests beside this one, have no step in common with it, which
    // the engine would take from its cache or lose from it.
    let dockerfile = format!("FROM scratch\nENV VERSION={version}\nCOPY app /app\nENTRYPOINT [\"/app\"]\n");
    fs::write(repository.join("Dockerfile"), dockerfile).expect("a file");
    let git = |args: &[&str]| {
        run(Command::new("git")
            .arg("-C")
            .arg(repository)
            .args(["-c", "user.name=ci", "-c", "user.email=ci@example.org"])
            .args(args));
    };
    git(&["add", "."]);
    git(&["commit", "-q", "-m", version]);
}

/// The scripts find this program.
fn path() -> String {
    let program = Path::new(env!("CARGO_BIN_EXE_demae")).parent().expect("a directory").display();
    format!("{program}:{}", std::env::var("PATH").unwrap_or_else(|_| "/usr/bin".to_owned()))
}

fn build(repository: &Path, more: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(script("build.sh"));
    command.arg("web").args(more).current_dir(repository).envs(env.iter().copied());
    command.output().expect("the script runs")
}

/// What a build prints, which must be one image.
fn built(lab: &Lab, output: &Output) -> String {
    let image = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    lab.remove_on_drop(ImageRef::try_from(image.as_str()).expect("an image").tagged());
    image
}

/// Removes what was built, so that the host must get it by itself.
fn forget(name: &str) {
    let id = docker(&["images", "-q", "--no-trunc", name]);
    docker(&["rmi", "-f", id.lines().next().expect("it is there")]);
}

#[test]
fn a_commit_is_built_and_deployed_by_a_registry_and_by_a_file() {
    let registry_at = free_address();
    let spec = |lab: &Lab| lab.socket_spec(&lab.image("v0"), "web.test", "deploy: {update_config: {monitor: 200ms}}\n");
    let (lab, _etcd) = lab_with_roles(spec);
    lab.wait_app("web", "converged", |a| a.state == State::Converged);
    let _registry = Registry::start(registry_at, lab.dir.path());
    let repository = lab.path("repository");
    fs::create_dir(&repository).expect("a directory");
    run(Command::new("git").args(["init", "-q"]).arg(&repository));
    fs::copy(images::example_app(), repository.join("app")).expect("copied");
    let deploy = |image: &str| {
        let mut command = with_user(&lab, &script("deploy.sh"), "deploy-web");
        let output = command.args(["web", image, "a merge"]).env("PATH", path()).output().expect("the script runs");
        assert!(output.status.success(), "{image}: {}", text(&output.stderr));
    };
    let serves = |version: &str| {
        let says = format!("version={version}");
        until("the version that was built serves", || {
            lab.get("web.test", "/").is_ok_and(|(_, body)| body.contains(&says))
        });
    };

    // A registry: by its digest.
    commit(&repository, "one");
    let place = format!("localhost:{}/team", registry_at.port());
    let image = built(&lab, &build(&repository, &[], &[("REGISTRY", &place)]));
    assert!(image.starts_with(&format!("{place}/web@sha256:")), "{image}");
    forget(&format!("{place}/web"));
    deploy(&image);
    serves("one");

    // A file, by its path and by an address that a program fetches; the second build of a night is another file.
    let archives = lab.path("builds");
    fs::create_dir(&archives).expect("a directory");
    let archives = archives.display().to_string();
    fs::write(lab.path("policy.toml"), format!("[images]\narchives = ['{archives}/*']\n")).expect("a file");
    commit(&repository, "two");
    let image = built(&lab, &build(&repository, &[], &[("ARCHIVES", &archives)]));
    assert!(image.starts_with(&format!("docker-archive:{archives}/web-")) && image.contains("@sha256:"), "{image}");
    let again = text(&build(&repository, &[], &[("ARCHIVES", &archives)]).stdout);
    assert_eq!(image, again, "the same image is the same file");
    forget("web");
    deploy(&image);
    serves("two");
    let image = built(&lab, &build(&repository, &["--full"], &[("ARCHIVES", &archives)]));
    forget("web");
    deploy(&image);
    let app = lab.wait_app("web", "converged", |a| a.state == State::Converged);
    assert_eq!(app.image.as_deref(), Some(image.as_str()));

    // By an address, from a server of that directory.
    let served = PathBuf::from(&archives);
    let server = Server::start(move |path| match fs::read(served.join(path)) {
        Ok(bytes) => Answer::new("200 OK", "", bytes),
        Err(_) => Answer::new("404 Not Found", "", ""),
    });
    let url = format!("http://{}", server.address);
    let rules = format!("[images]\narchives = ['{archives}/*', '{url}/*']\n");
    files::write(&lab.path("policy.toml"), &rules);
    commit(&repository, "three");
    let image = built(&lab, &build(&repository, &[], &[("ARCHIVES", &archives), ("ARCHIVES_URL", &url)]));
    assert!(image.starts_with(&format!("docker-archive:{url}/web-")), "{image}");
    forget("web");
    deploy(&image);
    serves("three");

    // A build that fails prints nothing to deploy.
    fs::write(repository.join("Dockerfile"), "FROM scratch\nCOPY none /app\n").expect("a file");
    for env in [&[("REGISTRY", place.as_str())][..], &[("ARCHIVES", archives.as_str())], &[]] {
        let output = build(&repository, &[], env);
        assert!(!output.status.success() && output.stdout.is_empty(), "{env:?}: {}", text(&output.stdout));
    }
    let left: Vec<String> = fs::read_dir(&archives)
        .expect("a directory")
        .map(|f| f.expect("a file").file_name().to_string_lossy().into_owned())
        .collect();
    assert!(left.len() == 3 && left.iter().all(|name| name.ends_with(".tar.gz") && !name.starts_with('.')), "{left:?}");
}

#[test]
fn what_was_merged_is_deployed_once_and_all_of_it_at_night() {
    let registry_at = free_address();
    let spec = |lab: &Lab| lab.socket_spec(&lab.image("v0"), "web.test", "deploy: {update_config: {monitor: 200ms}}\n");
    let (lab, _etcd) = lab_with_roles(spec);
    lab.wait_app("web", "converged", |a| a.state == State::Converged);
    let _registry = Registry::start(registry_at, lab.dir.path());
    let (repository, clone) = (lab.path("repository"), lab.path("clone"));
    fs::create_dir(&repository).expect("a directory");
    run(Command::new("git").args(["init", "-q"]).arg(&repository));
    fs::copy(images::example_app(), repository.join("app")).expect("copied");
    commit(&repository, "first-merge");
    run(Command::new("git").arg("clone").arg("-q").arg(&repository).arg(&clone));
    let place = format!("localhost:{}/team", registry_at.port());
    let update = |more: &[&str]| {
        let mut command = with_user(&lab, &script("update.sh"), "deploy-web");
        command.arg("web").args(more).current_dir(&clone).env("REGISTRY", &place).env("PATH", path());
        let output = command.output().expect("the script runs");
        assert!(output.status.success(), "{}", text(&output.stderr));
        let app = lab.wait_app("web", "converged", |a| a.state == State::Converged);
        let image = app.image.expect("it has one");
        lab.remove_on_drop(ImageRef::try_from(image.as_str()).expect("an image").tagged());
        (app.release, image)
    };
    let first = update(&[]);
    assert!(first.1.starts_with(&format!("{place}/web@sha256:")), "{}", first.1);
    assert_eq!(update(&[]), first, "nothing was merged");
    commit(&repository, "second-merge");
    let second = update(&[]);
    assert_ne!(second, first);
    assert_eq!(lab.get("web.test", "/").map(|(_, body)| body.contains("version=second-merge")), Ok(true));
    let night = update(&["--full"]);
    assert_ne!(night, second, "nothing is taken from the build before");
    assert_eq!(lab.get("web.test", "/").map(|(_, body)| body.contains("version=second-merge")), Ok(true));
    let names = docker(&["images", "--format", "{{.Repository}}:{{.Tag}}", &format!("{place}/web")]);
    names.lines().filter(|name| !name.ends_with(":<none>")).for_each(|name| lab.remove_on_drop(name.to_owned()));
}

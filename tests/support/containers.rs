//! Containers of a lab, inspected and changed from outside demae.

use demae::model::status::{AppStatus, State};

use super::{lab::Lab, process::docker, wait::until};

/// True if an app has converged on this image. All conditions are read from one status: two reads could disagree.
pub fn is_done(image: &str) -> impl Fn(&AppStatus) -> bool + use<'_> {
    move |s: &AppStatus| s.state == State::Converged && s.healthy == 1 && s.image.as_deref() == Some(image)
}

/// The containers of an app, by id.
pub fn ids(lab: &Lab, app: &str) -> Vec<String> {
    let labels = [format!("label=demae.host={}", lab.host), format!("label=demae.app={app}")];
    let listed = docker(&["ps", "-aq", "--no-trunc", "--filter", &labels[0], "--filter", &labels[1]]);
    listed.lines().map(str::to_owned).collect()
}

/// The one container of an app.
pub fn only(lab: &Lab, app: &str) -> String {
    let mut found = ids(lab, app);
    assert_eq!(found.len(), 1, "one container of `{app}`: {found:?}");
    found.remove(0)
}

/// One field of `docker inspect`, by template; empty if there is no such container.
pub fn inspect(container: &str, template: &str) -> String {
    docker(&["inspect", "--format", template, container])
}

/// Kills the one container of an app, and waits until it runs again and answers. It is the same container.
pub fn kill_and_wait(lab: &Lab, app: &str, host: &str) {
    let id = only(lab, app);
    let started = inspect(&id, "{{.State.StartedAt}}");
    docker(&["kill", &id]);
    until(&format!("`{app}` runs again"), || {
        inspect(&id, "{{.State.StartedAt}} {{.State.Running}}")
            .split_once(' ')
            .is_some_and(|(at, running)| at != started && running == "true")
            && lab.get(host, "/").is_ok_and(|(code, _)| code == 200)
    });
}

/// Containers not created by demae, removed with the test.
#[derive(Default)]
pub struct Foreign(Vec<String>);

impl Foreign {
    /// Makes one; its id.
    pub fn create(&mut self, options: &[&str], image: &str) -> String {
        let id = docker(&[&["create"][..], options, &[image]].concat());
        assert_eq!(id.len(), 64, "docker create {options:?}: {id}");
        self.0.push(id.clone());
        id
    }

    /// True if none of them has changed since its creation.
    pub fn are_untouched(&self) -> bool {
        self.0.iter().all(|id| inspect(id, "{{.Id}} {{.State.Status}}") == format!("{id} created"))
    }

    /// Removes one of them.
    pub fn remove(&mut self, id: &str) {
        docker(&["rm", id]);
        self.0.retain(|known| known != id);
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        for id in &self.0 {
            docker(&["rm", "-f", id]);
        }
    }
}

/// Removes all containers with this label of a host.
pub fn remove_all(host: &str) {
    let ids = docker(&["ps", "-aq", "--filter", &format!("label=demae.host={host}")]);
    let mut remove = vec!["rm", "-fv"];
    remove.extend(ids.lines());
    if remove.len() > 2 {
        docker(&remove);
    }
}

//! Runs the command of a release, at most once: its container has a fixed name and is never created a second time by
//! itself.

use std::{
    sync::PoisonError,
    time::{Duration, Instant},
};

use crate::{
    execute::{StepError, evidence},
    host::docker::{CommandPhase, DockerError, ImageFault},
    model::{
        desired::Target,
        fleet::{CommandEnd, CommandRun, EndedCommand, FleetImage, HostVerdict, VERSION},
        images::ASKED,
        name::{AppName, ImageDigest, ImageRef, ReleaseId},
        problem::chain,
        release::Release,
        spec::PullPolicy,
        time::Timestamp,
    },
    world::World,
};

/// Longest run of a command. A longer task is not one to hold a deploy up with.
const LONGEST: Duration = Duration::from_secs(3600);
/// Between two looks at a command that runs.
const LOOK: Duration = Duration::from_millis(300);
/// Between two questions for an image that the registry does not have.
const ASK_AGAIN: Duration = Duration::from_secs(2);
/// What a command has to end after its time is over.
const GRACE: Duration = Duration::from_secs(10);

impl World {
    /// Runs the command of a release, or waits for the end of one that an earlier agent has started. `is_own` says that this
    /// agent has written the start of it: else a container that is missing leaves open whether it has run.
    ///
    /// # Errors
    /// If Docker does not answer, or the image cannot be pulled; the caller tries again.
    pub async fn run_command(
        &self,
        app: &AppName,
        release: &ReleaseId,
        target: Option<&Target>,
        fleet_image: &FleetImage,
        (run, is_own): (&CommandRun, bool),
    ) -> Result<EndedCommand, StepError> {
        // Of another release nothing is known but its container.
        let target = target.filter(|target| target.release.id == *release);
        let end = self.end_of_command(app, release, target, fleet_image, (run, is_own)).await?;
        let digest = match (&end, target) {
            (CommandEnd::Done, Some(target)) if *fleet_image == FleetImage::Unwritten => {
                self.digest_of_command(app, &target.release).await?
            }
            _ => None,
        };
        Ok(EndedCommand { release: release.clone(), started: run.started, end, digest })
    }

    /// The digest of the image that the command of a release has run from; `None` if no registry gave it one.
    async fn digest_of_command(&self, app: &AppName, release: &Release) -> Result<Option<ImageDigest>, StepError> {
        let Some(container) = self.docker.command(app, &release.id).await? else { return Ok(None) };
        Ok(self.images.digest(&release.image, &container.image))
    }

    async fn end_of_command(
        &self,
        app: &AppName,
        release: &ReleaseId,
        target: Option<&Target>,
        fleet_image: &FleetImage,
        (run, is_own): (&CommandRun, bool),
    ) -> Result<CommandEnd, StepError> {
        let began = Instant::now();
        let token = format!("{app}/{release}/{}", run.started.as_millis());
        let mut is_late = false;
        loop {
            let found = self.docker.command(app, release).await?;
            // One that was there and is gone may have run, even if a person removed it.
            let was_there = {
                let mut seen = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
                let key = (app.clone(), run.started);
                if found.as_ref().is_some_and(|container| container.run == token) {
                    seen.insert(key.clone());
                }
                seen.contains(&key)
            };
            match (found, target) {
                // It is of an earlier try.
                (Some(container), _) if container.run != token => {
                    self.docker.stop(&container.id, GRACE).await?;
                    self.docker.remove(&container.id).await?;
                }
                (None, Some(target)) if is_own && !was_there => {
                    let policy = self.docker.policy();
                    let refused = policy.refusals(app, &target.release, target.ingress.as_ref());
                    if let Some(refusal) = refused.into_iter().next() {
                        return Err(DockerError::NotAllowed(refusal.to_string()).into());
                    }
                    self.check_mounts(app, &target.release.container)?;
                    let (named, digest) = (&target.release.image, fleet_image.digest());
                    let image = named.fixed(digest);
                    let may_be_old = target.pull_policy == PullPolicy::Always && *fleet_image == FleetImage::Unwritten;
                    if (may_be_old || self.docker.image(&image.tagged()).await?.is_none())
                        && let Some(absent) = self.pull_or_miss(app, named, digest).await?
                    {
                        return Ok(failed(absent, None, String::new()));
                    }
                    let command = target.release_command.clone().unwrap_or_default();
                    let network = self.shared_network(&target.release).await;
                    self.docker.create_command(app, (&target.release, &image), &command, &token, network).await?;
                }
                (None, _) => return Ok(CommandEnd::Unknown("its container is gone".to_owned())),
                (Some(container), _) => match container.phase {
                    // Of a release that is not wanted any more nothing is started.
                    CommandPhase::Created if target.is_none() => {
                        return Ok(CommandEnd::Unknown("another release was wanted before it was started".to_owned()));
                    }
                    CommandPhase::Created => match self.docker.start(&container.id).await {
                        // A program that is not there, for example: it will not be there the next time either.
                        Err(e) if !e.is_temporary() => return Ok(failed(chain(&e), None, String::new())),
                        started => started?,
                    },
                    CommandPhase::Running if began.elapsed() > LONGEST => {
                        is_late = true;
                        self.docker.stop(&container.id, GRACE).await?;
                    }
                    CommandPhase::Running => tokio::time::sleep(LOOK).await,
                    CommandPhase::Exited(0, _) if !is_late => return Ok(CommandEnd::Done),
                    CommandPhase::Exited(code, out_of_memory) => {
                        let cause = match (is_late, out_of_memory) {
                            (true, _) => {
                                format!("its release command did not end within {} min", LONGEST.as_secs() / 60)
                            }
                            (false, true) => format!("its release command ran out of memory (exit code {code})"),
                            (false, false) => format!("its release command ended with exit code {code}"),
                        };
                        let log = self.docker.log_tail(&container.id).await;
                        // Without its environment no value of it can be found in the log.
                        let log = target.map_or_else(String::new, |target| evidence(log, &target.release));
                        return Ok(failed(cause, Some(code), log));
                    }
                },
            }
        }
    }

    /// Pulls an image. Returns why it is not in the registry, which is asked more than once: the release has failed then.
    async fn pull_or_miss(
        &self,
        app: &AppName,
        image: &ImageRef,
        digest: Option<&ImageDigest>,
    ) -> Result<Option<String>, StepError> {
        let mut asked = 1;
        loop {
            match self.images.pull(app, image, digest).await {
                Err(e @ DockerError::Image { fault: ImageFault::Absent, .. }) if asked >= ASKED => {
                    return Ok(Some(chain(&e)));
                }
                Err(DockerError::Image { fault: ImageFault::Absent, .. }) => {
                    tokio::time::sleep(ASK_AGAIN).await;
                    asked += 1;
                }
                pulled => return Ok(pulled.map(|()| None)?),
            }
        }
    }

    /// Removes the container of a command whose end is known. No effect if it is gone.
    ///
    /// # Errors
    /// If the engine cannot.
    pub async fn remove_command(&self, app: &AppName, release: &ReleaseId) -> Result<(), StepError> {
        if let Some(container) = self.docker.command(app, release).await? {
            self.docker.remove(&container.id).await?;
        }
        Ok(())
    }
}

fn failed(cause: String, exit_code: Option<i64>, log_tail: String) -> CommandEnd {
    let cause = if exit_code.is_none() { format!("its release command cannot be started: {cause}") } else { cause };
    CommandEnd::Failed(HostVerdict { version: VERSION, cause, exit_code, log_tail, at: Timestamp::now() })
}

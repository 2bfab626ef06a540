//! Planners that are wrong on purpose. Each must be caught, else the properties watch nothing.

use demae::{
    model::observed::{Health, ObservedApp, Phase},
    plan::{AppInput, AppPlan, ProxyView, VhostWish, app::plan_app, step::Step},
};

fn with(input: &AppInput<'_>, change: impl FnOnce(&mut ObservedApp)) -> AppPlan {
    let mut observed = input.observed.clone();
    change(&mut observed);
    plan_app(&AppInput { observed: &observed, ..input.clone() })
}

/// Takes whatever runs for healthy.
pub fn switches_too_soon(input: &AppInput<'_>) -> AppPlan {
    with(input, |observed| {
        for instance in observed.instances.iter_mut().filter(|i| i.phase == Phase::Running) {
            instance.health = Health::Healthy;
        }
    })
}

/// Takes no connection for one that somebody waits on.
pub fn cuts_connections(input: &AppInput<'_>) -> AppPlan {
    with(input, |observed| {
        for instance in &mut observed.instances {
            instance.connections = Some(0);
        }
    })
}

/// Starts nothing again that has ended.
pub fn lets_the_dead_lie(input: &AppInput<'_>) -> AppPlan {
    let mut plan = plan_app(input);
    let is_dead = |step: &Step| {
        let Step::Start(handle) = step else { return false };
        let ended = |phase: &Phase| matches!(phase, Phase::Exited(_) | Phase::Paused);
        input.observed.instances.iter().any(|i| i.id == handle.id && ended(&i.phase))
    };
    plan.step = plan.step.filter(|planned| !is_dead(&planned.step));
    plan
}

/// Takes an app away before nginx has forgotten it.
pub fn removes_before_nginx_knows(input: &AppInput<'_>) -> AppPlan {
    plan_app(&AppInput { proxy: ProxyView { live: None, serving: true, ..input.proxy.clone() }, ..input.clone() })
}

/// Tells nginx nothing new.
pub fn forgets_nginx(input: &AppInput<'_>) -> AppPlan {
    AppPlan { vhost: VhostWish::Keep, ..plan_app(input) }
}

/// Cannot bear the first app.
pub fn panics_about_one_app(input: &AppInput<'_>) -> AppPlan {
    assert!(input.app.as_str() != "app0", "a mistake in the planner");
    plan_app(input)
}

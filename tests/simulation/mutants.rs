//! Planners that are wrong on purpose. Each must be caught, else the oracle detects nothing.

use std::collections::BTreeMap;

use demae::{
    model::{
        desired::DesiredApp,
        name::AppName,
        observed::{Health, ObservedApp, Phase},
        policy::BUILT_IN,
        proxy::{Upstreams, Vhost},
    },
    plan::{
        AppInput, AppPlan, ProxyView, VhostWish,
        app::plan_app,
        proxy::{ProxyInput, ProxyPlan, ProxyStep, plan_proxy},
        step::Step,
    },
};

fn with(input: &AppInput<'_>, change: impl FnOnce(&mut ObservedApp)) -> AppPlan {
    let mut observed = input.observed.clone();
    change(&mut observed);
    plan_app(&AppInput { observed: &observed, ..input.clone() })
}

/// Treats every running instance as healthy.
pub fn switches_too_soon(input: &AppInput<'_>) -> AppPlan {
    with(input, |observed| {
        for instance in observed.instances.iter_mut().filter(|i| i.phase == Phase::Running) {
            instance.health = Health::Healthy;
        }
    })
}

/// Ignores open connections.
pub fn cuts_connections(input: &AppInput<'_>) -> AppPlan {
    with(input, |observed| {
        for instance in &mut observed.instances {
            instance.connections = Some(0);
        }
    })
}

/// Does not look at what the host allows.
pub fn ignores_the_policy(input: &AppInput<'_>) -> AppPlan {
    plan_app(&AppInput { policy: &BUILT_IN, ..input.clone() })
}

/// Does not restart exited or paused containers.
pub fn does_not_restart(input: &AppInput<'_>) -> AppPlan {
    let mut plan = plan_app(input);
    let is_dead = |step: &Step| {
        let Step::Start(handle) = step else { return false };
        let ended = |phase: &Phase| matches!(phase, Phase::Exited(_) | Phase::Paused);
        input.observed.instances.iter().any(|i| i.id == handle.id && ended(&i.phase))
    };
    plan.step = plan.step.filter(|planned| !is_dead(&planned.step));
    plan
}

/// Removes an app before nginx has stopped routing to it.
pub fn removes_before_nginx_knows(input: &AppInput<'_>) -> AppPlan {
    plan_app(&AppInput { proxy: ProxyView { live: None, serving: true, ..input.proxy.clone() }, ..input.clone() })
}

/// Never changes nginx.
pub fn never_changes_nginx(input: &AppInput<'_>) -> AppPlan {
    AppPlan { vhost: VhostWish::Keep, ..plan_app(input) }
}

/// Panics for the first app.
pub fn panics_about_one_app(input: &AppInput<'_>) -> AppPlan {
    assert!(input.app.as_str() != "app0", "a mistake in the planner");
    plan_app(input)
}

/// Removes the virtual host of an app that is wanted.
pub fn removes_a_wanted_vhost(input: &AppInput<'_>) -> AppPlan {
    let plan = plan_app(input);
    let is_wanted = matches!(input.desired, DesiredApp::Run(t) if t.ingress.is_some());
    if is_wanted && input.proxy.live.is_some() { AppPlan { vhost: VhostWish::Remove, ..plan } } else { plan }
}

/// Leads requests to a port of no instance.
pub fn leads_to_dead_ports(input: &AppInput<'_>) -> AppPlan {
    let mut plan = plan_app(input);
    if let (VhostWish::Set(vhost), Some(_)) = (&mut plan.vhost, input.proxy.live)
        && let Upstreams::Ports(ports) = &mut vhost.upstreams
    {
        *ports = vec![1];
    }
    plan
}

/// Changes the set that is to be published.
fn with_set(input: &ProxyInput<'_>, change: impl FnOnce(&mut BTreeMap<AppName, Vhost>)) -> ProxyPlan {
    let mut plan = plan_proxy(input);
    if let Some((ProxyStep::Publish(vhosts), _)) = &mut plan.step {
        change(vhosts);
    }
    plan
}

/// Takes apps that are to stay as they are out of the set.
pub fn drops_apps_that_stay(input: &ProxyInput<'_>) -> ProxyPlan {
    with_set(input, |vhosts| {
        vhosts.retain(|app, _| !matches!(input.wishes.get(app), None | Some(VhostWish::Keep)));
    })
}

/// Leaves out an app that is to be served.
pub fn leaves_out_an_app(input: &ProxyInput<'_>) -> ProxyPlan {
    with_set(input, |vhosts| {
        vhosts.pop_last();
    })
}

/// Serves other ports than those that were asked for.
pub fn serves_other_ports(input: &ProxyInput<'_>) -> ProxyPlan {
    with_set(input, |vhosts| {
        for vhost in vhosts.values_mut() {
            if let Upstreams::Ports(ports) = &mut vhost.upstreams {
                ports.iter_mut().for_each(|port| *port = 1);
            }
        }
    })
}

/// Gives the hosts of one app to another one too.
pub fn gives_a_host_twice(input: &ProxyInput<'_>) -> ProxyPlan {
    with_set(input, |vhosts| {
        let hosts = vhosts.last_key_value().map(|(_, vhost)| vhost.hosts.clone()).unwrap_or_default();
        if vhosts.len() > 1
            && let Some(mut first) = vhosts.first_entry()
        {
            first.get_mut().hosts.extend(hosts);
        }
    })
}

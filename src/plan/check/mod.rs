//! Checks of plans before they are performed. They share no code with the planners, and only know what must never be
//! done. The agent runs them on every plan, of apps and of nginx; property tests and simulations run them on thousands of
//! generated histories. A refused plan changes nothing.

mod app;
mod proxy;

pub use app::violations;
pub use proxy::proxy_violations;

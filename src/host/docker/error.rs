//! Why a call to the engine failed.

use bollard::errors::Error;

use super::Operation;
use crate::model::problem::chain;

/// Why there is no image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageFault {
    /// For a reason that may pass by itself.
    Temporary,
    /// For one that a person must see to: a login, a file.
    Person,
    /// The registry does not have it, or not for this platform.
    Absent,
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum DockerError {
    /// The engine cannot be reached, or did not answer in time: nothing is known.
    #[error("Docker does not answer ({operation}): {reason}")]
    Unreachable {
        /// The call.
        operation: Operation,
        /// Why.
        reason: String,
    },
    /// The engine refused.
    #[error("Docker cannot {operation}: {message}")]
    Refused {
        /// The call.
        operation: Operation,
        /// The HTTP status.
        status: u16,
        /// The engine's message.
        message: String,
    },
    /// The image does not exist, or access to it is denied.
    #[error("image `{image}` cannot be pulled: {message}")]
    Image {
        /// Which.
        image: String,
        /// The registry's message.
        message: String,
        /// What helps.
        fault: ImageFault,
    },
    /// The rules of this host do not allow it.
    #[error("this host does not allow the container: {0}")]
    NotAllowed(String),
    /// The container's labels do not parse.
    #[error("container {id} has labels that demae does not write: {what}")]
    Labels {
        /// Which.
        id: String,
        /// What is wrong.
        what: String,
    },
}

impl DockerError {
    pub(super) fn of(operation: Operation) -> impl Fn(Error) -> Self {
        move |error| match error {
            Error::DockerResponseServerError { status_code, message } => {
                DockerError::Refused { operation, status: status_code, message: one_line(&message) }
            }
            other => DockerError::Unreachable { operation, reason: one_line_chain(&other) },
        }
    }

    pub(super) fn is_status(&self, wanted: u16) -> bool {
        matches!(self, DockerError::Refused { status, .. } if *status == wanted)
    }

    /// Whether a container could not be created because its image is missing.
    pub fn is_image_gone(&self) -> bool {
        matches!(self, DockerError::Refused { operation: Operation::Create, status: 404, message }
            if message.to_lowercase().contains("no such image"))
    }

    /// Whether the requested port is in use by another program.
    pub fn is_port_taken(&self) -> bool {
        matches!(self, DockerError::Refused { message, .. }
            if message.contains("port is already allocated") || message.contains("address already in use"))
    }

    /// Whether the engine's disk is full. Only the message says so.
    pub fn is_full(&self) -> bool {
        matches!(self, DockerError::Refused { message, .. } | DockerError::Image { message, .. }
            if message.to_lowercase().contains("no space left on device"))
    }

    /// Whether a registry refused the login of this host.
    pub(super) fn is_denied(&self) -> bool {
        matches!(self, DockerError::Image { message, .. } if super::image::is_refused_login(message))
    }

    /// Whether trying again can help without a person.
    pub fn is_temporary(&self) -> bool {
        match self {
            DockerError::Image { fault, .. } => *fault == ImageFault::Temporary,
            _ => true,
        }
    }
}

pub(super) fn one_line(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(400).collect()
}

pub(super) fn one_line_chain(error: &dyn std::error::Error) -> String {
    one_line(&chain(error))
}

//! The network that instances with an address of their own are in.

use std::{collections::HashMap, net::Ipv4Addr};

use bollard::models::{EndpointIpamConfig, EndpointSettings, Ipam, IpamConfig, NetworkCreateRequest, NetworkingConfig};
use ipnet::Ipv4Net;

use super::{Docker, DockerError, Operation, Result, label};
use crate::model::name::AppName;

/// Name of the interface of a bridge network, as an option of its driver.
const BRIDGE_NAME: &str = "com.docker.network.bridge.name";

/// A bridge network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgeNetwork {
    /// Its name.
    pub name: String,
    /// Its interface on this host.
    pub bridge: String,
    /// All its addresses.
    pub subnet: Ipv4Net,
    /// Those that Docker chooses from.
    pub dynamic: Ipv4Net,
}

/// The address of a container in a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnAddress {
    /// The network, by name.
    pub network: String,
    /// The address.
    pub ip: Ipv4Addr,
}

/// How a container joins a network: under the name of its app, and with an address if it has one of its own.
pub(super) fn networking(network: &str, app: &AppName, own: Option<&OwnAddress>) -> NetworkingConfig {
    let address =
        |own: &OwnAddress| EndpointIpamConfig { ipv4_address: Some(own.ip.to_string()), ..Default::default() };
    let endpoint =
        EndpointSettings { ipam_config: own.map(address), aliases: Some(vec![app.to_string()]), ..Default::default() };
    NetworkingConfig { endpoints_config: Some(HashMap::from([(network.to_owned(), endpoint)])) }
}

impl Docker {
    /// Creates a network unless there is one like it that is this agent's. Otherwise returns what is wrong with it.
    ///
    /// # Errors
    /// If the engine does not answer, or refuses to create it.
    pub async fn ensure_network(&self, wanted: &BridgeNetwork) -> Result<std::result::Result<(), String>> {
        let name = &wanted.name;
        let found = match self.call(Operation::Network, |client| client.inspect_network(name, None)).await {
            Ok(found) => found,
            Err(e) if e.is_status(404) => {
                let request = self.request(wanted);
                return match self.call(Operation::Network, |client| client.create_network(request.clone())).await {
                    Ok(_) => Ok(Ok(())),
                    Err(DockerError::Refused { message, .. }) => {
                        Ok(Err(format!("Docker does not create network `{name}`: {message}")))
                    }
                    Err(e) => Err(e),
                };
            }
            Err(e) => return Err(e),
        };
        let labels = found.labels.unwrap_or_default();
        let owner = self.owner.as_ref().map(|owner| owner.id().to_owned()).unwrap_or_default();
        if labels.get(label::AGENT).is_none_or(|id| *id != owner) {
            return Ok(Err(format!(
                "Docker's network `{name}` is not this agent's: name another as `tcp_routes.network`"
            )));
        }
        let config = found.ipam.and_then(|ipam| ipam.config).unwrap_or_default().into_iter().next().unwrap_or_default();
        let is_alike = config.subnet.as_deref() == Some(wanted.subnet.to_string().as_str())
            && config.ip_range.as_deref() == Some(wanted.dynamic.to_string().as_str())
            && found.options.unwrap_or_default().get(BRIDGE_NAME) == Some(&wanted.bridge);
        if is_alike {
            return Ok(Ok(()));
        }
        Ok(Err(format!(
            "Docker's network `{name}` was made with other settings than those of `[tcp_routes]`: remove it once no container uses it, or name another"
        )))
    }

    fn request(&self, wanted: &BridgeNetwork) -> NetworkCreateRequest {
        let config = IpamConfig {
            subnet: Some(wanted.subnet.to_string()),
            ip_range: Some(wanted.dynamic.to_string()),
            ..Default::default()
        };
        let owner = self.owner.as_ref().map(|owner| (label::AGENT.to_owned(), owner.id().to_owned()));
        NetworkCreateRequest {
            name: wanted.name.clone(),
            driver: Some("bridge".to_owned()),
            ipam: Some(Ipam { config: Some(vec![config]), ..Default::default() }),
            options: Some(HashMap::from([(BRIDGE_NAME.to_owned(), wanted.bridge.clone())])),
            labels: Some(owner.into_iter().collect()),
            ..Default::default()
        }
    }
}

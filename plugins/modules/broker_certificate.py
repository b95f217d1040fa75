#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A certificate of the broker's authority for a key that never leaves its host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: broker_certificate
short_description: Have the broker sign a perimeter's certificate, and renew it in time
version_added: 0.1.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Asks for a certificate when there is none, when it is for another key or from another authority, or when it ends soon.
  - Returns the certificate; writing it is the caller's.
extends_documentation_fragment:
  - secure_agent.workspace.broker
  - secure_agent.workspace.broker.attributes
options:
  kind:
    description:
      - V(perimeter) for the gatekeeper's client certificate, V(ring2) for ring 2's server certificate, V(bastion) for the
        client certificate of a bastion, V(machine) for that of a program that the broker's configuration names.
    type: str
    required: true
    choices: [perimeter, ring2, bastion, machine]
  name:
    description: Name of the perimeter host, or of the machine.
    type: str
    required: true
  csr:
    description: Signing request, PEM. May be empty in check mode, before the host has made its key.
    type: str
    required: true
  certificate:
    description: The present certificate, PEM; empty when there is none.
    type: str
    default: ""
  renew_days:
    description: Renew when less than this many days are left.
    type: int
    default: 20
"""

EXAMPLES = r"""
- name: Sign the gatekeeper's certificate
  secure_agent.workspace.broker_certificate:
    kind: perimeter
    name: edge
    csr: "{{ lookup('ansible.builtin.file', 'key.csr') }}"
"""

RETURN = r"""
certificate:
  description: The certificate to use, PEM; the given one when it still serves.
  type: str
  returned: success
  sample: "-----BEGIN CERTIFICATE-----"
reason:
  description: Why a new one was asked for; empty when none was.
  type: str
  returned: success
  sample: ends within 20 days
trust:
  description: Trust domain, authority certificate, SSH authorities and TUF root (null before the first publication).
  type: dict
  returned: success
  sample: {trust_domain: saw.example, ca_pem: "-----BEGIN CERTIFICATE-----"}
"""

import traceback
from datetime import datetime, timedelta, timezone

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible_collections.secure_agent.workspace.plugins.module_utils.broker import broker_options, operator

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    CRYPTOGRAPHY_ERROR = None
except ImportError:
    CRYPTOGRAPHY_ERROR = traceback.format_exc()


def why_renew(certificate: str, csr: str, ca_pem: str, now: datetime, renew: timedelta) -> str:
    """Return why ``certificate`` does not serve any longer; empty when it does."""
    if not certificate.strip():
        return "there is none"
    try:
        present = x509.load_pem_x509_certificate(certificate.encode())
        authority = x509.load_pem_x509_certificate(ca_pem.encode())
        present.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return "it is not from this authority"
    if csr.strip() and present.public_key() != x509.load_pem_x509_csr(csr.encode()).public_key():
        return "it is for another key"
    if present.not_valid_after_utc - now < renew:
        return f"it ends within {renew.days} days"
    return ""


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=broker_options(
            kind={"type": "str", "required": True, "choices": ["perimeter", "ring2", "bastion", "machine"]},
            name={"type": "str", "required": True},
            csr={"type": "str", "required": True},
            certificate={"type": "str", "default": ""},
            renew_days={"type": "int", "default": 20},
        ),
        supports_check_mode=True,
    )
    if CRYPTOGRAPHY_ERROR is not None:
        module.fail_json(msg=missing_required_lib("cryptography"), exception=CRYPTOGRAPHY_ERROR)
    csr, certificate = module.params["csr"], module.params["certificate"]
    if not csr.strip() and not module.check_mode:
        module.fail_json(
            msg="the signing request is empty",
            failure={"code": "csr_missing", "details": {}, "cure": "make it on the host: saw gateway init"},
        )
    with operator(module) as client:
        trust = client.request("GET", "/v1/trust")
        now, renew = datetime.now(tz=timezone.utc), timedelta(days=module.params["renew_days"])
        reason = why_renew(certificate, csr, trust["ca_pem"], now, renew)
        before = certificate
        if reason and not module.check_mode:
            body = {"csr_pem": csr, "kind": module.params["kind"], "name": module.params["name"]}
            certificate = client.request("POST", "/v1/certificates/x509", body)["certificate"]
        after = certificate if certificate != before or not reason else "(a new certificate)\n"
        module.exit_json(
            changed=bool(reason),
            reason=reason,
            certificate=certificate,
            trust=trust,
            diff={"before": before, "after": after},
        )


if __name__ == "__main__":
    main()

variable "ssh_host" {
  type        = string
  description = "Address of the light host that serves the root tree over SSH."
}

variable "ssh_key_file" {
  type        = string
  description = "Private key for root on that host."
}

variable "known_hosts_file" {
  type        = string
  description = "known_hosts with that host's key; an unknown key ends the build."
}

variable "root_tree" {
  type        = string
  description = "The root tree on this machine, for assembling the disk after provisioning."
}

variable "output" {
  type        = string
  description = "File name of the finished qcow2 image."
}

variable "seed" {
  type        = string
  description = "Digest of the build's inputs; partition and file system identifiers derive from it."
}

variable "wheelhouse" {
  type        = string
  description = "Directory with the hash-locked wheels for /opt/saw."
}

variable "mcp_servers" {
  type        = string
  description = "Directory with the node_modules of the MCP servers."
}

variable "python" {
  type        = string
  description = "Python interpreter that has ansible-core and saw."
}

variable "ansible_playbook" {
  type        = string
  description = "The ansible-playbook program to provision with."
}

variable "playbook" {
  type        = string
  default     = "playbooks/workspace_converge.yml"
  description = "The playbook that turns a base tree into a workspace; hosts use the same one."
}

variable "baseline" {
  type        = string
  default     = "true"
  description = "Whether the role baseline is part of the image (docs/baseline.md); changed here, so that it is one of the build's inputs."
}

variable "patching" {
  type        = string
  default     = "false"
  description = "Whether the role patching is part of the image (docs/patching.md); changed here, so that it is one of the build's inputs."
}

variable "edr_variables" {
  type        = string
  description = "JSON file that tells Ansible which endpoint detection the image carries (docs/edr.md); written by the build, whose input it is."
}

variable "image_variant" {
  type        = string
  default     = "cpu"
  description = "Variant of the image: cpu, or gpu with NVIDIA's driver (docs/gpu.md)."

  validation {
    condition     = contains(["cpu", "gpu"], var.image_variant)
    error_message = "The variable image_variant has to be cpu or gpu."
  }
}

variable "module_key" {
  type        = string
  default     = ""
  description = "Owner's private key for kernel modules on this machine; the variant gpu needs it."
}

variable "module_certificate" {
  type        = string
  default     = ""
  description = "Its certificate on this machine; the variant gpu needs it."
}

variable "secure_boot_key" {
  type        = string
  default     = ""
  description = "Owner's private key for boot images on this machine; empty leaves the image unsigned (docs/images.md)."
}

variable "secure_boot_certificate" {
  type        = string
  default     = ""
  description = "Its certificate on this machine."
}

# What depends on the base operating system: pkrvars/, one file for each.

variable "suite" {
  type        = string
  description = "Suite of the distribution that the tree was made of."
}

variable "keyring" {
  type        = string
  description = "Keyring on this machine that the distribution's archive was verified with, before Packer ran."
}

variable "packages" {
  type        = string
  description = "List of the tree's packages, below this directory."
}

variable "python_interpreter" {
  type        = string
  description = "Python that Ansible's modules run with in the tree."
}

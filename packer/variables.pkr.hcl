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

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

variable "root_verity" {
  type        = string
  default     = "false"
  description = "Whether the root file system is read-only and checked against a hash that the boot image names (docs/images.md)."

  validation {
    condition     = contains(["true", "false"], var.root_verity)
    error_message = "The variable root_verity has to be true or false."
  }
}

variable "host_key_name" {
  type        = string
  default     = "image"
  description = "Name under which the host key is in known_hosts: a machine's port is another one at each build."
}

# What the source qemu needs besides (saw.image.machine); the source null does without.

variable "machine_disk" {
  type        = string
  default     = "none"
  description = "The machine's disk with the base tree on it: a file or a URL."
}

variable "machine_disk_checksum" {
  type        = string
  default     = "none"
  description = "Checksum of that disk, sha256:HEX; none where the build itself has just made it."
}

variable "machine_kernel" {
  type        = string
  default     = ""
  description = "Kernel of the tree, which the machine is started with."
}

variable "machine_command_line" {
  type        = string
  default     = ""
  description = "Kernel command line of the machine; it names the first process."
}

variable "machine_accelerator" {
  type        = string
  default     = "tcg"
  description = "kvm, or tcg where KVM does not work; a device node that opens proves nothing."
}

variable "machine_cpu" {
  type        = string
  default     = "max"
  description = "Processor of the machine: host with KVM."
}

variable "machine_cpus" {
  type        = number
  default     = 2
  description = "Number of its processors."
}

variable "machine_memory" {
  type        = number
  default     = 2048
  description = "Its memory in MiB."
}

variable "machine_output" {
  type        = string
  default     = "machine-output"
  description = "Folder that Packer makes for the machine's disk; it must not be there yet."
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

variable "family" {
  type        = string
  default     = "debian"
  description = "Family of the distribution, debian or redhat: what its packages are."
}

variable "archive" {
  type        = string
  default     = "Debian"
  description = "Label of its archive in apt's Release files."
}

variable "components" {
  type        = string
  default     = "main"
  description = "Components of that archive, with blanks between."
}

variable "runtime_python" {
  type        = string
  default     = "3.13"
  description = "Version of the Python that /opt/saw is built with."
}

variable "python_interpreter" {
  type        = string
  description = "Python that Ansible's modules run with in the tree."
}

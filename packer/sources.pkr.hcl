# A root tree served over SSH by a light host on this machine: provisioning runs at native speed, no VM is needed.
# Nothing is booted in it, so roles install and enable but start nothing.
source "null" "tree" {
  communicator         = "ssh"
  ssh_host             = var.ssh_host
  ssh_username         = "root"
  ssh_private_key_file = var.ssh_key_file
  ssh_timeout          = "2m"
}
